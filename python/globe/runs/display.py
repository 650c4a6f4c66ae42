"""Progress on stderr: stage, throughput, time left and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from globe.runs.stages import Advance, peak_rss_bytes


class _Throughput(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")


class _Memory(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{peak_rss_bytes() / 2**30:.2f} GiB", style="magenta")


class RichDisplay:
    """Shows stages as bars that vanish into one line each."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        """Show one stage."""
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Throughput(),
            TimeRemainingColumn(elapsed_when_finished=True),
            _Memory(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda steps: progress.advance(task, steps)

    def log(self, line: str) -> None:
        """Show a line."""
        self._console.print(line, highlight=False, markup=False)
