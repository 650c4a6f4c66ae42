"""Named stages of a run: what each takes in seconds and memory, shown as it goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
    """A finished stage: wall seconds, bytes of tensors read, and the process's peak resident memory at its end.

    `resumed` where an earlier process did the stage or a part of it; its seconds and bytes are counted. With several
    ranks bytes read and memory are those of rank 0, and `bytes_sent` is what each sent to the others.
    """

    name: str
    seconds: float
    bytes_read: int
    peak_rss_bytes: int
    resumed: bool = False
    bytes_sent: int = 0


class Stages:
    """Runs stages one after another and records them."""

    def __init__(self, display: Display | None = None) -> None:
        self.display: Display = display or Silent()
        self.records: list[Stage] = []
        self._running: tuple[float, int, int, Stage] | None = None

    @contextmanager
    def stage(self, name: str, total: float, earlier: dict[str, Any] | None = None) -> Iterator[Advance]:
        """Time a stage of `total` steps, on top of the record of the part that an earlier process did."""
        before = Stage(**earlier) if earlier is not None else Stage(name, 0.0, 0, 0)
        before = replace(before, resumed=earlier is not None)
        self._running = (time.perf_counter(), _bytes_read(), _bytes_sent(), before)
        with self.display.stage(name, total) as advance:
            yield advance
        self.records.append(Stage(**self.so_far()))
        sent = self.records[-1].bytes_sent
        if sent > 50_000:
            self.display.log(f"{name}: {sent / 1e6:,.1f} MB sent by each rank")

    def so_far(self) -> dict[str, Any]:
        """The record of the running stage as of now."""
        assert self._running is not None, "no stage is running"
        started, read, sent, before = self._running
        seconds = before.seconds + time.perf_counter() - started
        peak = max(before.peak_rss_bytes, peak_rss_bytes())
        read, sent = before.bytes_read + _bytes_read() - read, before.bytes_sent + _bytes_sent() - sent
        return asdict(Stage(before.name, seconds, read, peak, before.resumed, sent))

    def recall(self, record: dict[str, Any]) -> None:
        """Add the record of a stage that an earlier process finished."""
        stage = replace(Stage(**record), resumed=True)
        self.records.append(stage)
        self.display.log(f"{stage.name}: done before, in {stage.seconds:.1f} s")

    def as_list(self) -> list[dict[str, Any]]:
        """The records as plain values."""
        return [asdict(record) for record in self.records]


def _bytes_read() -> int:
    from globe.checkpoint.tensorfile import (
        bytes_read,  # brings torch, which the command line does without until it runs
    )

    return bytes_read()


def _bytes_sent() -> int:
    from globe.compute import ranks  # as above

    return ranks.sent()


def peak_rss_bytes() -> int:
    """The process's peak resident set, in bytes.

    Linux's own figure where it is there: getrusage's begins with the parent's, across exec.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
