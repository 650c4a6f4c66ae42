"""A display for tests."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any


class Lines:
    """A display that keeps the lines and the names of the stages that were run."""

    def __init__(self, lines: list[str] | None = None) -> None:
        self.lines: list[str] = lines if lines is not None else []
        self.stages: list[str] = []

    def stage(self, name: str, total: float) -> Any:
        self.stages.append(name)
        return nullcontext(lambda steps: None)

    def log(self, line: str) -> None:
        self.lines.append(line)
