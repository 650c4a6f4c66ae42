"""How fast a fit goes, and so how much more of it fits into its turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from globe.runs.turn import Turn

Value = TypeVar("Value")
_SPARE = 1.1  # of what has been measured: the next of its kind may take longer


@dataclass(frozen=True)
class Fitting:
    """Steps that fit, and the iterations of each."""

    steps: int
    iterations: int

    def told(self) -> str:
        """In words."""
        if self.steps == 0:
            return "no step fits: the seeds are kept, on supports that are met"
        return f"{self.steps} {'step' if self.steps == 1 else 'steps'} of {self.iterations} iterations"


class Pace:
    """Times passes and products with the Gauss-Newton matrix of a fit, and says what fits; without a turn, all does.

    Parameters
    ----------
    turn : Turn or None
    share : float
        What a product takes as a share of a pass, or what a loop does beside its pass, until it has been measured.
    """

    def __init__(self, turn: Turn | None, share: float) -> None:
        self._turn, self._share = turn, share
        self._clock = turn.clock if turn is not None else time.perf_counter
        self._pass = 0.0
        self._product: float | None = None
        self._between: float | None = None

    def a_pass(self, work: Callable[[], Value], part: float = 1.0) -> Value:
        """Do a pass, or `part` of its work; the newest tells what the next will take."""
        value, seconds = self._timed(work)
        self._pass = seconds / part
        return value

    def products(self, work: Callable[[], Value], count: Callable[[Value], int]) -> Value:
        """Solve for a step by products that `count` finds in what it gives, and as much as one beside."""
        value, seconds = self._timed(work)
        self._product = seconds / (count(value) + 1)
        return value

    def between(self, work: Callable[[], Value]) -> Value:
        """Do what a loop does beside its pass."""
        value, self._between = self._timed(work)
        return value

    def steps(self, steps: int, iterations: int, passes: int = 0) -> Fitting:
        """Of so many steps of the joint fit those that fit, of so many iterations each, after so many passes.

        Half of them where half as many steps more fit so: in equal time short steps are then no worse (gate of the
        SmolLM2 mixture: two of 8 iterations 0.0217, three of 4 0.0206; six of 8 0.0134, eight of 4 0.0140).
        """
        if self._turn is None:
            return Fitting(steps, iterations)
        fewer = max(1, iterations // 2)
        whole, half = (min(steps, self._count(self._step(each), passes)) for each in (iterations, fewer))
        shorter = half > whole and 2 * half >= 3 * whole
        return Fitting(half, fewer) if shorter else Fitting(whole, iterations)

    def loops(self, loops: int) -> int:
        """Of so many loops of the alternating solver those that fit, after the pass that measures the last one."""
        if self._turn is None:
            return loops
        return min(loops, self._count(self._pass + self._update(), passes=1))

    def fits_update(self) -> bool:
        """Whether the rest of a loop fits after its pass, and a pass that measures what it makes."""
        return self._turn is None or self._count(self._update(), passes=1) > 0

    def fits_pass(self) -> bool:
        """Whether one more pass fits."""
        return self._turn is None or self._count(self._pass, passes=0) > 0

    def left(self) -> float:
        """Seconds left of the turn."""
        return math.inf if self._turn is None else self._turn.left

    def _update(self) -> float:
        return self._between if self._between is not None else self._share * self._pass

    def _step(self, iterations: int) -> float:
        """Seconds of a step: its iterations, one to stay conjugate to the step before, what is set up, and a pass."""
        product = self._product if self._product is not None else self._share * self._pass
        return self._pass + (iterations + 2) * product

    def _count(self, seconds: float, passes: int) -> int:
        """How many times so many seconds fit, with some passes beside."""
        left = self.left() - _SPARE * passes * self._pass
        return max(0, math.floor(left / max(_SPARE * seconds, 1e-9)))

    def _timed(self, work: Callable[[], Value]) -> tuple[Value, float]:
        started = self._clock()
        value = work()
        return value, self._clock() - started
