"""Symmetric products of which only the panels on and above the diagonal are computed."""

from __future__ import annotations

import torch

from globe.compute.gemm import matmul

_PANELS = 4  # of columns of a symmetric product
UPPER = (1 + 1 / _PANELS) / 2  # the share of it that is computed


def upper_gram(x: torch.Tensor) -> torch.Tensor:
    """xᵀ x (k, k) of x (n, k) in fp32, with zeros in most of what lies below its diagonal (see `mirrored`)."""
    columns = x.shape[1]
    width = max(64, -(-columns // _PANELS))
    total = torch.zeros(columns, columns, device=x.device)
    for first in range(0, columns, width):
        total[first : first + width, first:] = matmul(x[:, first : first + width].T, x[:, first:])
    return total


def mirrored(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrices (..., k, k) of which these are right on their diagonals and above."""
    return upper.triu() + upper.triu(1).mT
