"""Compressions in processes that are killed.

Forked from a process that has imported everything and computed nothing: starting one takes milliseconds, and no
thread of the parent is missing in the child.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from helper_process import HelperProcess

# What a compression imports to calibrate a tiny OLMoE.
CALIBRATES = ("globe.statistics.calibrate", "globe.evaluation.models", "transformers.models.olmoe.modeling_olmoe")


class Killer(HelperProcess):
    """Start compressions and kill them; use it with `with`."""

    def __init__(self, *modules: str) -> None:
        """Import modules that the compressions are going to need, once for all of them."""
        super().__init__(__file__, *modules)

    def run(self, source: Path, out: Path, settings: dict[str, Any], **when: Any) -> int:
        """Compress and return the exit status, -9 if it was killed.

        Parameters
        ----------
        source, out : Path
        settings : dict
        when : Any
            `seconds` after which the process is killed, or `place` ("module:name" or "module:class.name") of a
            function of which the `call`-th call is its last act (`entered=True`: of which it is not begun).
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"source": str(source), "out": str(out), "settings": settings, **when}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def set_trap(place: str, call: int = 1, entered: bool = False, denied: bool = False, slow: float = 0.0) -> None:
    """Let the process end at a call of a function, as `Killer.run` says; or the call fail, the file system's way.

    Where it is `slow`, it only begins so many seconds later.
    """
    module, name = place.split(":")
    *outer, name = name.split(".")
    holder = sys.modules[module]
    for part in outer:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), iter(range(1, 1 << 30))

    def trapped(*arguments: Any, **options: Any) -> Any:
        last = next(calls) == call
        if last and denied:
            raise PermissionError(errno.EACCES, "Permission denied")
        if last and slow:
            time.sleep(slow)
            return original(*arguments, **options)
        if last and entered:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(holder, name, trapped)


def _serve(modules: list[str]) -> None:
    from globe.pipeline.compress import compress
    from globe.settings import Settings

    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        seconds = order.pop("seconds", None)
        child = os.fork()
        if child == 0:
            try:
                source, out, settings = (order.pop(key) for key in ("source", "out", "settings"))
                if order:
                    set_trap(**order)
                compress(source, out, Settings(**settings))
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
