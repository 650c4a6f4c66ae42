"""D²-MoE's form (arXiv 2502.17298): the mean of a layer's experts, and a low-rank delta each.

The deltas are truncated in the metric, as theirs are. Their base is merged with Fisher weights, which take gradients of
the model; here the plain mean and the mean weighted by how much each expert is used are tried, and the base is stored
whole or at a lower rank (in place of their pruning of its columns): the best of all on a few layers is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .svd import truncate
from .task import Approximation, Layer, Task, Tensor, error, stored

_PROBED_LAYERS = 3
_BASE_RANKS = (1.0, 0.75, 0.5, 0.25, 0.125)  # of min(p, d); the first is stored as a dense matrix


@dataclass(frozen=True)
class Form:
    """Rank of the base (None: dense), rank of the deltas, and whether the mean is weighted by use."""

    base: int | None
    delta: int
    by_use: bool


def fit(task: Task) -> Approximation:
    """Base and deltas at the split of the budget that errs least on a few layers."""
    forms = candidates(task)
    started = task.clock()
    step = max(1, len(task.layers) // _PROBED_LAYERS)
    probes = [task.layers[number] for number in range(step // 2, len(task.layers), step)]
    if len(forms) > 1:
        forms.sort(key=lambda form: sum(error(layer, approximate(layer, form)) for layer in probes))
    best = forms[0]
    about = {"rank": best.delta, "base_rank": best.base, "by_use": best.by_use}
    return Approximation(
        len(task.layers) * stored_bytes(task, best),
        _layers(task, best),
        {**about, "tuning_seconds": task.clock() - started},
    )


def candidates(task: Task) -> list[Form]:
    """The forms that fit the budget, each with the largest rank of the deltas."""
    forms = []
    uses = (False, True) if task.layers[0].shares is not None else (False,)
    for share in _BASE_RANKS:
        base = None if share == 1 else max(1, round(share * min(task.p, task.d)))
        left = task.budget - stored_bytes(task, Form(base, 0, False))
        if left >= 0:
            delta = min(left // (2 * task.experts * (task.p + task.d)), task.p, task.d)
            forms += [Form(base, delta, by_use) for by_use in uses]
    if not forms:
        raise ValueError(f"a budget of {task.budget} bytes a layer holds no base of {task.p} × {task.d}")
    return forms


def stored_bytes(task: Task, form: Form) -> int:
    """Of a layer."""
    side = task.p + task.d
    return 2 * ((task.p * task.d if form.base is None else form.base * side) + task.experts * form.delta * side)


def approximate(layer: Layer, form: Form) -> Tensor:
    """Ŵ of a layer's experts."""
    weights = layer.weights
    if form.by_use and layer.shares is not None and layer.shares.sum() > 0:
        mean = (weights * (layer.shares / layer.shares.sum()).view(-1, 1, 1)).sum(0)
    else:
        mean = weights.mean(0)
    if form.base is None:
        base = stored(mean)
    else:
        rows = None if layer.rows is None else layer.rows.mean(0, keepdim=True)
        base = truncate(mean[None], form.base, layer.columns, rows)[0]
    if form.delta == 0:
        return base.expand_as(weights)
    return base + truncate(weights - base, form.delta, layer.columns, layer.rows)


def _layers(task: Task, form: Form) -> Iterator[Tensor]:
    for layer in task.layers:
        yield approximate(layer, form)
