"""Left factors by ordinary least squares (specification, G and H.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.gemm import matmul, spd_inverse
from globe.settings import Settings


@dataclass(frozen=True)
class LeftFit:
    """A_i (n, p, r), and which experts needed a ridge (n,)."""

    lefts: torch.Tensor
    ridged: torch.Tensor


def fit_lefts(weights: torch.Tensor, mixtures: torch.Tensor, settings: Settings) -> LeftFit:
    """A_i = argmin ‖W_i − A_i B̃_i‖_F², by A_i = W_i B̃_iᵀ (B̃_i B̃_iᵀ)⁻¹.

    Every row of A_i depends on its own row of W_i alone, so held-out rows are regressed on B̃_i too.

    Parameters
    ----------
    weights : torch.Tensor, shape (n, p, d), fp32
    mixtures : torch.Tensor, shape (n, r, d), fp32
    settings : Settings
        `ridge` and `ridge_rcond`.
    """
    inverse, ridged = spd_inverse(matmul(mixtures, mixtures.mT), settings.ridge, settings.ridge_rcond)
    return LeftFit(matmul(matmul(weights, mixtures.mT), inverse), ridged)


def squared_errors(weights: torch.Tensor, lefts: torch.Tensor, mixtures: torch.Tensor) -> torch.Tensor:
    """‖W_i[k,:] − A_i[k,:] B̃_i‖² of every row, shape (n, p), on the CPU in fp64."""
    residual = weights - matmul(lefts, mixtures)
    return residual.pow(2).sum(2).cpu().double()
