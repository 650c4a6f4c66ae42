"""Factors rounded to integers with a scale a group: to the nearest, or with feedback of the errors made so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.compute.forms import wide_dtype
from globe.errors import GlobeError

_DAMPING = 0.01  # of the mean diagonal of a Hessian
LEAST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Rounded:
    """A matrix as integers q and scales s: the value in column k is q · s of the group of k.

    Parameters
    ----------
    codes : torch.Tensor of int8, shape (rows, inner)
        From −2^(bits−1) to 2^(bits−1) − 1.
    scales : torch.Tensor, shape (rows, inner / group), fp32
        Values that bf16 holds, above zero.
    bits, group : int
        Of an integer; columns that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    def matrix(self) -> torch.Tensor:
        """The values, fp32 (rows, inner)."""
        return self.codes.float() * self.scales.repeat_interleave(self.group, 1)


def round_nearest(matrix: torch.Tensor, bits: int, group: int) -> Rounded:
    """Every value to the nearest integer times its group's scale, which takes the largest to the largest integer.

    Parameters
    ----------
    matrix : torch.Tensor, shape (rows, inner), fp32
    bits : int
        From 2 to 8.
    group : int
        Divides `inner`.

    Raises
    ------
    GlobeError
        If the matrix has NaN or Inf, or `group` does not divide its columns.
    """
    _check(matrix, group)
    grouped = matrix.float().unflatten(1, (-1, group))
    scales = _scales(grouped, bits)
    return Rounded(_codes(grouped, scales[..., None], bits).flatten(1), scales, bits, group)


def round_with_feedback(
    matrix: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, weights: torch.Tensor | None = None
) -> Rounded:
    """Rounding Q of a matrix A for a small tr((A − Q) H (A − Q)ᵀ): GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    Columns are rounded one after another, and what each loses is made up for by those that follow: they move by
    −e U[k, k+1:] / U[k, k], with UᵀU the inverse of H, 1 % of whose mean diagonal is added to its diagonal first.

    Parameters
    ----------
    matrix : torch.Tensor, shape (rows, inner), fp32
    hessian : torch.Tensor, shape (inner, inner)
        Symmetric and positive semidefinite.
    bits, group : int
        As for `round_nearest`.
    weights : torch.Tensor, optional, shape (rows,)
        Of the rows' errors. Rows are rounded each by itself, so that they change nothing here.

    Raises
    ------
    GlobeError
        As `round_nearest`, or if the Hessian has NaN or Inf.
    """
    _check(matrix, group)
    wide = hessian.to(wide_dtype(matrix.device))
    if not bool(wide.isfinite().all()):
        raise GlobeError("the Hessian of a factor to be rounded holds NaN or Inf; expected finite numbers")
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        return round_nearest(matrix, bits, group)
    damped = wide / mean
    damped.diagonal().add_(_DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    moved = matrix.float().clone()
    codes = torch.empty_like(moved, dtype=torch.int8)
    scales = torch.empty(len(moved), moved.shape[1] // group, device=moved.device)
    for place, first in enumerate(range(0, moved.shape[1], group)):
        some = slice(first, first + group)
        part, factor = moved[:, some], upper[some, some]
        scales[:, place] = _scales(part, bits)
        errors = torch.empty_like(part)
        for k in range(group):
            codes[:, first + k] = _codes(part[:, k], scales[:, place], bits)
            errors[:, k] = (part[:, k] - codes[:, first + k] * scales[:, place]) / factor[k, k]
            part[:, k + 1 :] -= errors[:, k, None] * factor[k, k + 1 :]
        moved[:, some.stop :] -= errors @ upper[some, some.stop :]
    return Rounded(codes, scales, bits, group)


def _check(matrix: torch.Tensor, group: int) -> None:
    if not bool(matrix.isfinite().all()):
        raise GlobeError("a factor to be rounded holds NaN or Inf; expected finite numbers")
    if matrix.shape[1] % group:
        raise GlobeError(f"a factor has {matrix.shape[1]} columns; expected groups of {group} to divide them")


def _scales(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What takes the largest of the last axis to the largest integer, as bf16 holds it; one where all are zero."""
    peaks = values.abs().amax(-1)
    scales = (peaks / (2 ** (bits - 1) - 1)).clamp(min=LEAST_SCALE).bfloat16().float()
    return torch.where(peaks > 0, scales, torch.ones_like(scales))


def _codes(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    largest = 2 ** (bits - 1)
    return (values / scales).round().clamp(-largest, largest - 1).to(torch.int8)
