"""Each expert's best low rank in its metric: plain truncated SVD, and SVD-LLM where there are activation statistics.

SVD-LLM (arXiv 2403.07378) truncates the SVD of W S, S Sᵀ = M, and undoes S; any S gives the same product. Here the
row metric is whitened as well where the task has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .factors import factor_bytes, largest_rank, product, stored_right, turned
from .grid import Bits
from .task import Approximation, Task, Tensor, leading, orthonormal, root


def fit(task: Task) -> Approximation:
    """argmin over rank r of Σ_i ‖R_i^{1/2} (W_i − A_i B_i) M^{1/2}‖², the largest r that the budget holds."""

    def size(rank: int) -> int:
        return task.experts * (factor_bytes(task.p, rank, task.bits) + factor_bytes(rank, task.d, task.bits))

    rank = largest_rank(task.budget, size, min(task.p, task.d))
    return Approximation(len(task.layers) * size(rank), _layers(task, rank), {"rank": rank})


def _layers(task: Task, rank: int) -> Iterator[Tensor]:
    for layer in task.layers:
        yield truncate(layer.weights, rank, layer.columns, layer.rows, task.bits)


def truncate(
    weights: Tensor, rank: int, columns: Tensor | None, rows: Tensor | None, bits: Bits | None = None
) -> Tensor:
    """Each matrix of `weights` (E, p, d) in the best rank-r form, from factors as they are stored."""
    side = None if columns is None else root(columns).float()
    found = []
    for number, matrix in enumerate(weights):
        basis = _basis(matrix, rank, side, None if rows is None else root(rows[number]).float())
        right = stored_right(basis if bits is None else turned(basis[None])[0], columns, bits)
        found.append(product(right, matrix[None], columns, bits)[0])
    return torch.stack(found)


def _basis(matrix: Tensor, rank: int, side: Tensor | None, left_root: Tensor | None) -> Tensor:
    """Orthonormal rows (r × d) that span those of the best A B.

    Of X = R^{1/2} W M^{1/2}, the leading singular vectors on its shorter side; their span is all that matters. That of
    Bᵀ is M^{-1/2} V = Wᵀ R^{1/2} U Σ⁻¹, and U is X V Σ⁻¹: no inverse.
    """
    white = matrix if side is None else matrix @ side
    white = white if left_root is None else left_root @ white
    wide = white.double()
    if matrix.shape[0] <= matrix.shape[1]:
        vectors = leading(wide @ wide.mT, rank)
    else:
        vectors = wide @ leading(wide.mT @ wide, rank)
    vectors = vectors if left_root is None else left_root.double() @ vectors
    return orthonormal(matrix.mT.double() @ vectors).mT
