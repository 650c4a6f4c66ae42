"""A clock that stands still until it is told otherwise, and fits whose passes and products move it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from globe.fit import joint, training
from globe.fit.objective import Value
from globe.fit.problem import Problem


class Clock:
    """Seconds, which pass when `tick` is called."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


def moved_by_fits(clock: Clock, patch: pytest.MonkeyPatch, a_pass: float, product: float = 0.0) -> None:
    """Let passes of both solvers, and products with the Gauss-Newton matrix or dictionary steps, take so long.

    A pass that asks for f alone, or makes W'_i first, takes the part of it that its operations are.
    """
    look = Problem.look

    def looking(problem: Problem, bank: torch.Tensor, *given: Any) -> Value:
        clock.tick(a_pass * joint._Shares.of(bank, problem).of_pass(given[1] is None, problem.made))
        return look(problem, bank, *given)

    def ticking(work: Callable[..., Any], seconds: Callable[[Any], float]) -> Callable[..., Any]:
        def done(*given: Any, **options: Any) -> Any:
            value = work(*given, **options)
            clock.tick(seconds(value))
            return value

        return done

    patch.setattr(Problem, "look", looking)
    patch.setattr(joint, "newton_step", ticking(joint.newton_step, lambda newton: product * (newton.iterations + 1)))
    for name in ("measure", "sweep"):
        patch.setattr(training, name, ticking(getattr(training, name), lambda value: a_pass))
    patch.setattr(training, "_dictionary_step", ticking(training._dictionary_step, lambda value: product))
