"""Named stages of a run: what each takes in seconds and memory, shown as it goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Advance = Callable[[float], None]


class Display(Protocol):
    """Shows a stage of `total` steps while it runs, and single lines between."""

    def stage(self, name: str, total: float) -> AbstractContextManager[Advance]:
        """Show a stage; the value is called with the steps done."""

    def log(self, line: str) -> None:
        """Show a line."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: float) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return nullcontext(lambda steps: None)

    def log(self, line: str) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: wall seconds, bytes of tensors read, and the process's peak resident memory at its end."""

    name: str
    seconds: float
    bytes_read: int
    peak_rss_bytes: int


class Stages:
    """Runs stages one after another and records them."""

    def __init__(self, display: Display | None = None) -> None:
        self.display: Display = display or Silent()
        self.records: list[Stage] = []

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        """Time a stage of `total` steps."""
        from globe.tensorfile import bytes_read  # brings torch, which the command line does without until it runs

        started, read = time.perf_counter(), bytes_read()
        with self.display.stage(name, total) as advance:
            yield advance
        self.records.append(Stage(name, time.perf_counter() - started, bytes_read() - read, peak_rss_bytes()))

    def as_list(self) -> list[dict[str, Any]]:
        """The records as plain values."""
        return [asdict(record) for record in self.records]


def peak_rss_bytes() -> int:
    """The process's peak resident set, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
