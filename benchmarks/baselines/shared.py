"""One right subspace for all experts of a layer, a left factor for each: weighted PCA of the stacked experts."""

from __future__ import annotations

from collections.abc import Iterator

from .task import Approximation, Task, Tensor, fit_left, leading, orthonormal, root, stored


def fit(task: Task) -> Approximation:
    """argmin over V (r × d) and A_i of Σ_i ‖R_i^{1/2} (W_i − A_i V) M^{1/2}‖² in every layer."""
    row = 2 * (task.experts * task.p + task.d)
    rank = min(task.budget // row, task.d, task.experts * task.p)
    return Approximation(len(task.layers) * row * rank, _layers(task, rank), {"rank": rank})


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
        right = stored(basis.mT)
        yield stored(fit_left(right.expand(len(weights), -1, -1), weights, layer.columns)) @ right
