"""What every baseline is given and what it hands back, and the least squares that they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .grid import Bits

Tensor = torch.Tensor

_FLOOR = 1e-9  # of the mean eigenvalue of a metric, below which a direction counts as this much


@dataclass(frozen=True)
class Layer:
    """The experts of one layer and the metric in which they are to be approximated.

    The error of an approximation is Σ_i tr(R_i (W_i − Ŵ_i) M (W_i − Ŵ_i)ᵀ).

    Parameters
    ----------
    weights : torch.Tensor, shape (E, p, d), fp32
        `down` is transposed, so that p is the experts' width and d the model's in every family.
    columns : torch.Tensor, shape (d, d), fp64, optional
        M; the identity where it is not given.
    rows : torch.Tensor, shape (E, p, p), fp64, optional
        R_i; the identity where it is not given.
    shares : torch.Tensor, shape (E,), optional
        How much each expert is used.
    transposed : bool
        Whether the experts multiply what runs along p: `down`.
    """

    weights: Tensor
    columns: Tensor | None = None
    rows: Tensor | None = None
    shares: Tensor | None = None
    transposed: bool = False

    def row(self, expert: int) -> Tensor | None:
        """R_i."""
        return None if self.rows is None else self.rows[expert]


@dataclass(frozen=True)
class Task:
    """A family of experts to be stored in a budget.

    Parameters
    ----------
    layers : sequence of Layer
        Read when asked for, one at a time. All have the same number of experts.
    experts, p, d : int
        E, p and d of a layer.
    budget : int
        Bytes that one layer may take; 2 a weight.
    seconds : float, optional
        Time that an iterative method may take for all layers, its tuning not counted.
    seed : int
    clock : callable
        What a second is: the wall's, or the processor's where others share the machine.
    bits : Bits, optional
        What weights or factors are rounded to; bf16 where it is not given.
    """

    layers: Sequence[Layer]
    experts: int
    p: int
    d: int
    budget: int
    seconds: float | None = None
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    bits: Bits | None = None


@dataclass
class Approximation:
    """What a baseline found.

    Attributes
    ----------
    stored_bytes : int
        Of all layers.
    layers : iterator of torch.Tensor, shape (E, p, d)
        Ŵ made of the factors as they are stored, in the order of the task's layers, each when asked for.
    about : dict
        Rank and whatever else was chosen; `tuning_seconds` where choosing took time of its own.
    """

    stored_bytes: int
    layers: Iterator[Tensor]
    about: dict[str, Any] = field(default_factory=dict)


def stored(factor: Tensor) -> Tensor:
    """A factor as bf16 stores it, in fp32."""
    return factor.to(torch.bfloat16).float()


def root(metric: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix, or of a batch of them, in fp64."""
    values, vectors = torch.linalg.eigh(metric.double())
    floor = _FLOOR * values.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found: Tensor = (vectors * values.maximum(floor).sqrt().unsqueeze(-2)) @ vectors.mT
    return found


def leading(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of a symmetric matrix as columns, fp64."""
    vectors: Tensor = torch.linalg.eigh(gram.double())[1]
    return vectors.flip(-1)[..., :rank]


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of columns."""
    basis: Tensor = torch.linalg.qr(columns.double())[0]
    return basis


def fit_left(right: Tensor, weights: Tensor, columns: Tensor | None) -> Tensor:
    """argmin_A ‖(W − A B) M^{1/2}‖: W M Bᵀ (B M Bᵀ)⁻¹, for matrices or batches of them; fp32.

    A row metric does not change it.
    """
    right = right.double()
    weighted = right if columns is None else right @ columns
    return _solve(weighted @ right.mT, weights.float() @ weighted.float().mT)


def fit_right(left: Tensor, weights: Tensor, rows: Tensor | None) -> Tensor:
    """argmin_B ‖R^{1/2} (W − A B)‖; fp32."""
    return fit_left(left.mT, weights.mT, rows).mT


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """X with X G = Y, G positive semidefinite."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = 1e-10 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(gram + torch.diag_embed(shift.expand_as(diagonal)))
    return torch.cholesky_solve(right.double().mT, factor).mT.float()


def error(layer: Layer, approximation: Tensor) -> float:
    """Σ_i tr(R_i (W_i − Ŵ_i) M (W_i − Ŵ_i)ᵀ)."""
    return energy(layer.weights - approximation, layer.columns, layer.rows)


def energy(matrices: Tensor, columns: Tensor | None = None, rows: Tensor | None = None) -> float:
    """Σ_i tr(R_i X_i M X_iᵀ) for matrices X (E, p, d)."""
    left = matrices if columns is None else matrices @ columns.float()
    right = matrices if rows is None else rows.float() @ matrices
    return float((left * right).sum(-1).double().sum())
