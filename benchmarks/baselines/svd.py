"""Each expert's best low rank in its metric: plain truncated SVD, and SVD-LLM where there are activation statistics.

SVD-LLM (arXiv 2403.07378) truncates the SVD of W S, S Sᵀ = M, and undoes S; any S gives the same product. Here the
row metric is whitened as well where the task has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .task import Approximation, Task, Tensor, fit_left, fit_right, leading, orthonormal, root, stored


def fit(task: Task) -> Approximation:
    """argmin over rank r of Σ_i ‖R_i^{1/2} (W_i − A_i B_i) M^{1/2}‖², the largest r that the budget holds."""
    rank = min(task.budget // (2 * task.experts * (task.p + task.d)), task.p, task.d)
    size = 2 * len(task.layers) * task.experts * rank * (task.p + task.d)
    return Approximation(size, _layers(task, rank), {"rank": rank})


def _layers(task: Task, rank: int) -> Iterator[Tensor]:
    for layer in task.layers:
        yield truncate(layer.weights, rank, layer.columns, layer.rows)


def truncate(weights: Tensor, rank: int, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """Each matrix of `weights` (E, p, d) in the best rank-r form, from factors stored in bf16."""
    side = None if columns is None else root(columns).float()
    return torch.stack(
        [
            _one(matrix, rank, columns, side, None if rows is None else rows[number])
            for number, matrix in enumerate(weights)
        ]
    )


def _one(matrix: Tensor, rank: int, columns: Tensor | None, side: Tensor | None, rows: Tensor | None) -> Tensor:
    """Of X = R^{1/2} W M^{1/2}, the leading singular vectors on its shorter side; their span is all that matters.

    The span of A is R^{-1/2} U = W M^{1/2} V Σ⁻¹, that of B likewise M^{-1/2} V = Wᵀ R^{1/2} U Σ⁻¹: no inverse.
    """
    left_root = None if rows is None else root(rows).float()
    white = matrix if side is None else matrix @ side
    white = white if left_root is None else left_root @ white
    wide = white.double()
    if matrix.shape[0] <= matrix.shape[1]:
        vectors = leading(wide @ wide.mT, rank)
        if left_root is None:
            left = stored(vectors)
            return left @ stored(fit_right(left, matrix, None))
        along = matrix.mT.double() @ (left_root.double() @ vectors)  # M^{-1/2} V Σ
        right = stored(orthonormal(along).mT)
        return stored(fit_left(right, matrix, columns)) @ right
    vectors = leading(wide.mT @ wide, rank)
    if side is None:
        right = stored(vectors.mT)
        return stored(fit_left(right, matrix, None)) @ right
    across = matrix.double() @ (side.double() @ vectors)
    left = stored(orthonormal(across))
    return left @ stored(fit_right(left, matrix, rows))
