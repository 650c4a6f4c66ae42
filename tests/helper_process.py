"""A Python file that runs as a process of its own and is told over a pipe what to do."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Any


class HelperProcess:
    """The process; use it with `with`, at whose end its input is closed and it is waited for."""

    def __init__(self, file: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, file, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
