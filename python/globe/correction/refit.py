"""`down` of a layer's experts refitted to what the layer's output lacks, dense or by its left factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from globe.checkpoint.powers import saturated
from globe.compute.spd import row_basis
from globe.correction.composed import Factors
from globe.correction.regression import Normal, Regressed, regress
from globe.settings import Settings
from globe.statistics.experts import Experts, Seen

WIDEST = 2048  # inputs of one regression: dense experts are refitted together while theirs are no more
_HELD = 4  # every so many windows one is held out


@dataclass(frozen=True)
class Batch:
    """What the compressed experts saw of some windows, and r (n, d) with what it is weighed by (n, 1)."""

    seen: Seen
    residuals: torch.Tensor
    weights: torch.Tensor
    held: torch.Tensor


def batch_of(seen: Seen, outputs: tuple[torch.Tensor, torch.Tensor], span: slice) -> Batch:
    """What is kept of a call: its hidden values, which the next call overwrites, and what the output lacks.

    `outputs` are the original layer's and the compressed one's, of the windows of `span`.
    """
    device = seen.inputs.device
    original, compressed = (each.to(device).float().flatten(0, -2) for each in outputs)
    sizes = original.square().mean(1, keepdim=True).sqrt()
    weights = torch.where(sizes > 0, 1 / sizes, torch.ones_like(sizes))
    kept = Seen(seen.inputs[:0], seen.routing, seen.factors[2:].clone())
    window = len(original) // (span.stop - span.start)
    held = torch.arange(span.start, span.stop, device=device).repeat_interleave(window) % _HELD == _HELD - 1
    return Batch(kept, weights * (original - compressed), weights, held)


def groups(down: torch.Tensor) -> Iterator[slice]:
    """Consecutive experts of (E, d, p) that are refitted together."""
    size = max(1, WIDEST // down.shape[2])
    for first in range(0, len(down), size):
        yield slice(first, min(first + size, len(down)))


def refit_dense(experts: Experts, group: slice, batches: list[Batch], form: tuple[float, torch.dtype]) -> float | None:
    """Change `down` of a group of experts, in place, and the residuals with it; the ridge that was taken.

    `form` is what the layer multiplies its experts' output by, and the dtype that `down` is stored in.
    """
    (gain, dtype), down = form, experts.down[group]
    count, d, p = down.shape
    found = _regressed(group, p, batches, gain)
    if found.ridge is not None:
        change = found.change.float().view(count, p, d).mT.to(down.device)
        _put(experts, group, (down.float() + change).to(dtype), batches, gain)
    return found.ridge


def refit_lefts(
    experts: Experts, factors: dict[int, Factors], batches: list[Batch], form: tuple[float, Settings]
) -> list[float | None]:
    """Change the left factors of `down`, one expert after another, in place, and the residuals with them; the ridges.

    W_i = A_i B̃_i is the transpose of `down`. With Q the orthonormal rows of B̃_i = C Q, what W_i changes by when A_i
    does is X Q, so X is regressed on r Qᵀ and A_i changes by X C⁻¹. `form` is as for `refit_dense`, with the settings
    `ridge` and `ridge_rcond` for Q in place of the dtype.
    """
    (gain, settings), ridges = form, []
    for number in sorted(factors):
        left, mixed, group = factors[number].left, factors[number].mixed, slice(number, number + 1)
        inner, basis, _ = row_basis(mixed[None], settings.ridge, settings.ridge_rcond)
        found = _regressed(group, left.shape[0], batches, gain, basis[0].mT)
        ridges.append(found.ridge)
        if found.ridge is None:
            continue
        change = found.change.float().to(left.device) @ inner[0]
        factors[number] = Factors(saturated(left.float() + change, torch.bfloat16)[0], mixed)
        _put(experts, group, factors[number].matrix().mT[None], batches, gain)
    return ridges


def held_error(batches: list[Batch]) -> float:
    """Σ ‖r‖² over the tokens held out."""
    return sum(float(batch.residuals[batch.held].double().square().sum()) for batch in batches)


def weighed_inputs(batch: Batch, group: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n,) that are sent to a group's experts, and their w_te h_te (n, experts · p), weighed as residuals.

    Zero for the experts of the group that a token is not sent to.
    """
    routing, (hidden,) = batch.seen.routing, batch.seen.factors
    spans = routing.spans[group]
    sent = torch.zeros(len(batch.residuals), dtype=torch.bool, device=hidden.device)
    for span in spans:
        sent[routing.rows[span]] = True
    rows = sent.nonzero()[:, 0]
    places = sent.cumsum(0) - 1
    inputs = hidden.new_zeros(len(rows), len(spans), width)
    for number, span in enumerate(spans):
        mine = routing.rows[span]
        inputs[places[mine], number] = hidden[span] * (routing.weights[span, None] * batch.weights[mine])
    return rows, inputs.flatten(1)


def _regressed(
    group: slice, width: int, batches: list[Batch], gain: float, onto: torch.Tensor | None = None
) -> Regressed:
    """What the outputs of a group of experts are to change by for their inputs, as residuals are or `onto` columns."""
    sums: list[Normal] = []
    for batch in batches:
        rows, inputs = weighed_inputs(batch, group, width)
        targets = batch.residuals[rows] if onto is None else batch.residuals[rows] @ onto
        sums = sums or [Normal.none(inputs.shape[1], targets.shape[1]) for _ in range(2)]
        for normal, chosen in zip(sums, (~batch.held[rows], batch.held[rows]), strict=True):
            normal.add(inputs[chosen] * gain, targets[chosen])
    return regress(*sums)


def _put(experts: Experts, group: slice, changed: torch.Tensor, batches: list[Batch], gain: float) -> None:
    """Give a group of experts another `down` (n, d, p), and take what that adds to the output from the residuals."""
    down = experts.down[group]
    before = down.float().clone()
    down.copy_(changed)
    taken = (down.float() - before).mT.flatten(0, 1) * gain
    for batch in batches:
        rows, inputs = weighed_inputs(batch, group, down.shape[2])
        batch.residuals[rows] -= inputs @ taken
