"""The steps of a healing: Adam on the parameters that move, saved now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from globe.healing.loss import learn
from globe.healing.options import Healing
from globe.healing.parts import Moving, learning
from globe.healing.state import State

BETAS = (0.9, 0.95)
_WARM_STEPS, _LEAST = 10, 0.02
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


def descend(run: Run, options: Healing, state: State, advance: Advance) -> Descent:
    """Move the parameters until the steps or the minutes are over, from the last checkpoint if there is one.

    The rate rises over ten steps and falls along a cosine, over the steps or over the time.
    """
    optimiser = _optimiser(run.parts, options.rate)
    rates = [group["lr"] for group in optimiser.param_groups]
    losses, used = _recall(run, state, optimiser)
    began = saved = time.monotonic()
    took = 0.0  # by the last checkpoint
    advance(_done(len(losses), used, options))
    finite = all(map(math.isfinite, losses))
    with learning(run.parts):
        while finite and _done(len(losses), used + time.monotonic() - began, options) < 1.0:
            seconds = used + time.monotonic() - began
            done, step = _done(len(losses), seconds, options), len(losses)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(step, done)
            losses.append(learn(run.model, run.teacher, _batch(run.windows, step, options)))
            finite = math.isfinite(losses[-1])
            if finite:
                optimiser.step()
                for each in run.parts:
                    each.set(each.master)
            optimiser.zero_grad()
            now = time.monotonic()
            if now - saved > max(_SAVE_SECONDS, took / _SAVE_SHARE):
                _save(run, state, optimiser, losses, used + now - began)
                saved = time.monotonic()
                took = saved - now
            advance(_done(len(losses), used + now - began, options) - done)
    seconds = used + time.monotonic() - began
    _save(run, state, optimiser, losses, seconds)
    return Descent(len(losses), seconds, tuple(losses), finite)


def _optimiser(parts: list[Moving], rate: float) -> torch.optim.Optimizer:
    """Adam, with a rate over every tensor's own root mean square."""
    sizes = [float(each.master.square().mean().sqrt()) for each in parts]
    groups = [{"params": [each.master], "lr": rate * size} for each, size in zip(parts, sizes, strict=True)]
    return torch.optim.Adam(groups, betas=BETAS)


def _schedule(step: int, done: float) -> float:
    """The share of the full rate that a step takes, of which `done` is how much of all is over."""
    return min(1.0, (step + 1) / _WARM_STEPS) * max(_LEAST, 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def _done(steps: int, seconds: float, options: Healing) -> float:
    return steps / options.steps if options.steps is not None else seconds / (60.0 * options.minutes)


def _batch(windows: torch.Tensor, step: int, options: Healing) -> torch.Tensor:
    """The windows of a step: all windows come by, in another order each time."""
    picked: list[int] = []
    for number in range(step * options.batch, (step + 1) * options.batch):
        turn, place = divmod(number, len(windows))
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + turn)
        picked.append(int(torch.randperm(len(windows), generator=generator)[place]))
    return windows[picked]


def _recall(run: Run, state: State, optimiser: torch.optim.Optimizer) -> tuple[list[float], float]:
    """Put parameters and optimiser where the last checkpoint has them; its KLs and seconds."""
    found = state.progress()
    if found is None:
        return [], run.used
    for each in run.parts:
        each.set(found["parameters"][each.name])
    optimiser.load_state_dict(found["optimiser"])
    return list(found["losses"]), float(found["seconds"])


def _save(run: Run, state: State, optimiser: torch.optim.Optimizer, losses: list[float], seconds: float) -> None:
    parameters = {each.name: each.master for each in run.parts}
    kept = {"parameters": parameters, "optimiser": optimiser.state_dict(), "losses": losses, "seconds": seconds}
    state.save_progress(kept)
