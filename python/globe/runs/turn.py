"""Time that a run, or a part of it, may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Turn:
    """A time to be done by, on a clock of its own (seconds)."""

    ends: float
    clock: Clock = time.perf_counter

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.ends - self.clock()

    def within(self, seconds: float) -> Turn:
        """A turn that ends in so many seconds, or with this one."""
        return Turn(min(self.ends, self.clock() + max(0.0, seconds)), self.clock)
