"""MoBE's form (arXiv 2508.05257): W_i ≈ A_i f(Σ_j softmax(z_i)_j B_j) with a bank of m matrices for each layer.

As in the published code, Adam moves A, B and z of a layer together on weights scaled to unit variance, from the leading
right singular vectors of m runs of experts and z = 1 for an expert's own run. Beyond it, all in its favour:
- A starts and ends as the least-squares fit, so that the activation's slope does not have to be learnt;
- rank and m share the budget as short runs on one layer find best, and so do the learning rate and the scale of B,
  which decides how far the activation is from linear;
- the learning rate falls to a fiftieth over the time there is, and a run that ends worse than it began is dropped;
- in the metric, the loss is that of the metric; without an activation the basis is whitened, as the curvature is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from .factors import factor_bytes, largest_rank, product, stored_right, turned
from .grid import Bits
from .task import Approximation, Layer, Task, Tensor, error, fit_left, leading, root

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "none": lambda matrices: matrices,
}
RATES = (0.07, 0.02, 0.006, 0.002)  # the first is the published one
_LAST_RATE = 0.02


@dataclass(frozen=True)
class Choice:
    """Bank size m, rank r, learning rate, the scale of B in standard deviations of an entry, and bits if not bf16."""

    bank: int
    rank: int
    rate: float
    scale: float
    bits: Bits | None = None


def fit(task: Task, activation: str) -> Approximation:
    """Adam for `task.seconds` over all layers, after finding the best choice on the middle layer."""
    if task.seconds is None:
        raise ValueError("MoBE's form is trained for a given time; none was given")
    each = task.seconds / len(task.layers)
    started = task.clock()
    torch.manual_seed(task.seed)
    choice, tried = tune(task, activation, each)
    tuning = task.clock() - started
    about: dict[str, Any] = {**asdict(choice), "tried": tried, "tuning_seconds": tuning}
    choice = replace(choice, bits=task.bits)  # the tuning is of factors in bf16, of the ranks that the bits leave
    size = len(task.layers) * stored_bytes(task, choice.bank, choice.rank)
    steps: list[int] = []
    about["steps"] = steps
    return Approximation(size, _layers(task, activation, choice, each, steps), about)


def _layers(task: Task, activation: str, choice: Choice, seconds: float, steps: list[int]) -> Iterator[Tensor]:
    for layer in task.layers:
        found, taken = train(layer, activation, choice, seconds, task.clock)
        steps.append(taken)
        yield found


def tune(task: Task, activation: str, seconds: float) -> tuple[Choice, int]:
    """Runs on the middle layer: all choices for an eighth of a layer's time, the best two of each bank size for half of
    it, the best of each for all of it.
    """
    layer = task.layers[len(task.layers) // 2]
    scales = (1.0, task.d**-0.5) if activation != "none" else (1.0,)
    choices = [Choice(bank, rank, rate, scale) for bank, rank in splits(task) for rate in RATES for scale in scales]
    tried = len(choices)
    for part, kept in ((8, 2), (2, 1), (1, 1)):
        errors = {each: error(layer, train(layer, activation, each, seconds / part, task.clock)[0]) for each in choices}
        choices.sort(key=errors.__getitem__)
        banks = {each.bank: [other for other in choices if other.bank == each.bank] for each in choices}
        choices = [each for same in banks.values() for each in same[:kept]]
    return choices[0], tried


def splits(task: Task) -> list[tuple[int, int]]:
    """Bank sizes 1, 2, 4, … and E, each with the largest rank that the budget leaves."""
    found = []
    for bank in sorted({min(1 << power, task.experts) for power in range(task.experts.bit_length() + 1)}):
        rank = largest_rank(task.budget, partial(stored_bytes, task, bank), min(task.p, task.d))
        if rank > 0:
            found.append((bank, rank))
    if not found:
        raise ValueError(f"a budget of {task.budget} bytes a layer holds no basis of {task.experts} experts")
    return found


def stored_bytes(task: Task, bank: int, rank: int) -> int:
    """A and B as they are stored, the codes, which are dense, in fp32."""
    lefts = task.experts * factor_bytes(task.p, rank, task.bits)
    return lefts + factor_bytes(bank * rank, task.d, task.bits) + 4 * task.experts * bank


def train(
    layer: Layer, activation: str, choice: Choice, seconds: float, clock: Callable[[], float]
) -> tuple[Tensor, int]:
    """Ŵ of a layer's experts from stored factors, and the steps that `seconds` allowed.

    The row metric, where there is one, weighs the loss too.
    """
    deadline = clock() + seconds
    act, experts = ACTIVATIONS[activation], len(layer.weights)
    side = None if layer.columns is None else root(layer.columns / layer.columns.diagonal().mean()).float()
    left_side = None
    if layer.rows is not None:
        left_side = root(layer.rows / layer.rows.diagonal(dim1=1, dim2=2).mean()).float()
    target = layer.weights / layer.weights.std()
    whiten = side is not None and activation == "none"
    space = target @ side if whiten and side is not None else target
    groups = torch.arange(experts) * choice.bank // experts
    atoms = torch.stack([_basis(layer, groups == number, choice.rank, side, whiten) for number in range(choice.bank)])
    atoms *= choice.scale / atoms.square().mean().sqrt()
    logits = torch.nn.functional.one_hot(groups, choice.bank).float()
    lefts = fit_left(act(_mix(logits, atoms)), space, None if whiten else layer.columns)
    began_with = (logits, atoms.clone())
    variables = [lefts.requires_grad_(), atoms.requires_grad_(), logits.requires_grad_()]
    adam = torch.optim.Adam(variables, lr=choice.rate)
    began = clock()
    steps = 0
    while (now := clock()) < deadline:
        progress = (now - began) / (deadline - began)
        adam.param_groups[0]["lr"] = choice.rate * (1 - progress * (1 - _LAST_RATE))
        adam.zero_grad()
        residual = lefts @ act(_mix(logits, atoms)) - space
        residual = residual if whiten or side is None else residual @ side
        residual = residual if left_side is None else left_side @ residual
        residual.square().mean().backward()
        adam.step()
        steps += 1

    def finished(state: tuple[Tensor, Tensor], bits: Bits | None) -> Tensor:
        right = _stored(layer, state[1], side if whiten else None, activation == "none", bits)
        return product(act(_mix(state[0], right)), layer.weights, layer.columns, bits)

    states = [(logits.detach(), atoms.detach()), began_with]
    found = [finished(state, None) for state in states]
    best = min((0, 1), key=lambda number: error(layer, found[number]))
    return (found[best] if choice.bits is None else finished(states[best], choice.bits)), steps


def _mix(logits: Tensor, atoms: Tensor) -> Tensor:
    return (logits.softmax(1) @ atoms.flatten(1)).view(len(logits), *atoms.shape[1:])


def _basis(layer: Layer, members: Tensor, rank: int, side: Tensor | None, whiten: bool) -> Tensor:
    """The leading right singular vectors of some stacked experts (r × d), in the metric's space if `whiten`."""
    stacked = layer.weights[members].flatten(0, 1)
    white = stacked if side is None else stacked @ side
    if len(white) < white.shape[1]:
        vectors = leading(white.double() @ white.mT.double(), min(rank, len(white)))
        directions = torch.linalg.qr(white.mT.double() @ vectors)[0]
    else:
        directions = leading(white.mT.double() @ white.double(), rank)
    if side is not None and not whiten:  # the span of M^{-1/2} V, without the inverse
        directions = torch.linalg.qr(stacked.mT.double() @ (white.double() @ directions))[0]
    found = directions.mT.float()
    missing = rank - len(found)
    return found if missing <= 0 else torch.cat([found, 0.01 * torch.randn(missing, found.shape[1])])


def _stored(layer: Layer, atoms: Tensor, side: Tensor | None, linear: bool, bits: Bits | None) -> Tensor:
    """Atoms as they are stored; those of a whitened basis, whose `side` is given, are in the weights' space again."""
    if side is not None:  # rows scaled alike
        atoms = torch.linalg.solve(side.double(), atoms.flatten(0, 1).mT.double()).mT.view_as(atoms).float()
    if bits is not None and linear:
        atoms = turned(atoms)
    return stored_right(atoms, layer.columns, bits)
