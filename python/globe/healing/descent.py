"""The steps of a healing: Adam on what moves, one group of layers after another, saved now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from globe.compute import ranks
from globe.healing.loss import learn
from globe.healing.options import Healing
from globe.healing.parts import Moving, by_layers, learning
from globe.healing.state import State

BETAS = (0.9, 0.95)
_WARM_STEPS, _LEAST = 10, 0.02
_ROUNDS = 2  # of turns, where there are several groups
_SAVE_SECONDS, _SAVE_SHARE = 60.0, 0.02  # between checkpoints, and the most of the time that they may take

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Run:
    """What the steps work on.

    `used` is the number of seconds that went before the steps.
    """

    model: Any
    teacher: Any
    parts: list[Moving]
    windows: torch.Tensor
    used: float = 0.0


@dataclass(frozen=True)
class Descent:
    """What the steps did: their number, seconds with what went before, and the KL of every step's batch, in nats.

    `finite` is False where a KL was not, and the steps ended there.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]
    finite: bool = True


@dataclass
class _Walk:
    """Where the steps are: the KL of each, seconds that went before `began`, the turn, the step that it began with, and
    the state that its optimiser goes on from.
    """

    losses: list[float]
    used: float
    turn: int = -1
    first: int = 0
    optimiser: dict[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """With those that went before."""
        return self.used + time.monotonic() - self.began

    def done(self, options: Healing) -> float:
        """How much of all is over, by rank 0's clock."""
        if options.steps:
            return len(self.losses) / options.steps
        return ranks.agreed(self.seconds() / (60.0 * options.minutes))

    def finite(self) -> bool:
        """Whether the last KL is."""
        return not self.losses or math.isfinite(self.losses[-1])


def descend(run: Run, options: Healing, state: State, advance: Advance) -> Descent:
    """Move the parameters until the steps or the minutes are over, from the last checkpoint if there is one.

    Groups of layers take turns, the first layers first, in equal shares of the steps or the time, and only the one
    whose turn it is has gradients and moments. In a turn the rate rises over ten steps and falls along a cosine.
    """
    walk, groups = _recall(run, state), by_layers(run.parts, options.layers_at_a_time)
    turns = len(groups) * (_ROUNDS if len(groups) > 1 else 1)
    done = walk.done(options)
    advance(done)
    saved, took = time.monotonic(), 0.0  # the last checkpoint: when, and how long
    while walk.finite() and done < 1.0:
        turn = int(done * turns)
        if turn != walk.turn:
            walk.turn, walk.first, walk.optimiser = turn, len(walk.losses), None
        group = groups[turn % len(groups)]
        optimiser = _optimiser(group, options.rate)
        if walk.optimiser is not None:
            optimiser.load_state_dict(walk.optimiser)
        walk.optimiser = optimiser.state_dict()
        with learning(group):
            while walk.finite() and done < 1.0 and int(done * turns) == turn:
                share = _schedule(len(walk.losses) - walk.first, done * turns - turn)
                mine = learn(run.model, run.teacher, _batch(run.windows, len(walk.losses), options))
                walk.losses.append(ranks.added(mine) / ranks.size())
                if walk.finite():
                    _step(optimiser, share, group)
                optimiser.zero_grad()
                walk.optimiser = optimiser.state_dict()
                if time.monotonic() - saved > max(_SAVE_SECONDS, took / _SAVE_SHARE):
                    saved = time.monotonic()
                    _save(run, state, walk)
                    saved, took = time.monotonic(), time.monotonic() - saved
                before, done = done, walk.done(options)
                advance(done - before)
    _save(run, state, walk)
    return Descent(len(walk.losses), walk.seconds(), tuple(walk.losses), walk.finite())


def _optimiser(parts: list[Moving], rate: float) -> torch.optim.Optimizer:
    """Adam, with a full rate over every tensor's own root mean square."""
    rates = [rate * float(each.master.square().mean().sqrt()) for each in parts]
    groups = [{"params": [each.master], "lr": full, "full": full} for each, full in zip(parts, rates, strict=True)]
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


def _step(optimiser: torch.optim.Optimizer, share: float, parts: list[Moving]) -> None:
    """Step at a share of the full rates, by the mean of the ranks' gradients."""
    if ranks.size() > 1:
        for each in parts:
            found = each.master.grad if each.master.grad is not None else torch.zeros_like(each.master)
            each.master.grad = ranks.summed(found).div_(ranks.size())
    for group in optimiser.param_groups:
        group["lr"] = share * group["full"]
    optimiser.step()
    for each in parts:
        each.set(each.master)


def _schedule(step: int, done: float) -> float:
    """The share of the full rate that a step takes, of which `done` is how much of all is over."""
    return min(1.0, (step + 1) / _WARM_STEPS) * max(_LEAST, 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def _batch(windows: torch.Tensor, step: int, options: Healing) -> torch.Tensor:
    """This rank's windows of a step: all windows come by, in another order each time."""
    picked: list[int] = []
    for number in range(step * options.batch, (step + 1) * options.batch):
        turn, place = divmod(number, len(windows))
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + turn)
        picked.append(int(torch.randperm(len(windows), generator=generator)[place]))
    return windows[ranks.share(picked)]


def _recall(run: Run, state: State) -> _Walk:
    """Where the last checkpoint was, the parameters put there; or the start."""
    found = state.progress()
    if found is None:
        return _Walk([], run.used)
    for each in run.parts:
        each.set(found["parameters"][each.name])
    return _Walk(found["losses"], found["seconds"], found["turn"], found["first"], found["optimiser"])


def _save(run: Run, state: State, walk: _Walk) -> None:
    if ranks.rank() != 0:
        return
    kept = {"turn": walk.turn, "first": walk.first, "optimiser": walk.optimiser, "losses": walk.losses}
    parameters = {each.name: each.master for each in run.parts}
    state.save_progress({**kept, "parameters": parameters, "seconds": walk.seconds()})
