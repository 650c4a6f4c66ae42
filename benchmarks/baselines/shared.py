"""One right subspace for all experts of a layer, a left factor for each: weighted PCA of the stacked experts."""

from __future__ import annotations

from collections.abc import Iterator

from .factors import factor_bytes, largest_rank, product, stored_right, turned
from .task import Approximation, Task, Tensor, leading, orthonormal, root


def fit(task: Task) -> Approximation:
    """argmin over V (r × d) and A_i of Σ_i ‖R_i^{1/2} (W_i − A_i V) M^{1/2}‖² in every layer."""

    def size(rank: int) -> int:
        return factor_bytes(task.experts * task.p, rank, task.bits) + factor_bytes(rank, task.d, task.bits)

    rank = largest_rank(task.budget, size, min(task.d, task.experts * task.p))
    return Approximation(len(task.layers) * size(rank), _layers(task, rank), {"rank": rank})


def _layers(task: Task, rank: int) -> Iterator[Tensor]:
    for layer in task.layers:
        weights = layer.weights
        weighted = weights if layer.rows is None else layer.rows.float() @ weights
        gram = (weighted.flatten(0, 1).mT @ weights.flatten(0, 1)).double()
        gram = (gram + gram.mT) / 2
        if layer.columns is None:
            basis = leading(gram, rank)
        else:  # the span of M^{-1/2} Q, Q leading in M^{1/2} G M^{1/2}, is that of G M^{1/2} Q
            side = root(layer.columns)
            basis = orthonormal(gram @ (side @ leading(side @ gram @ side, rank)))
        right = basis.mT if task.bits is None else turned(basis.mT[None])[0]
        yield product(stored_right(right, layer.columns, task.bits), weights, layer.columns, task.bits)
