"""Which implementation of a kernel runs."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from globe import _native
from globe.kernels.arguments import whole
from globe.machine.processors import affinity, usable_processors

BACKENDS = ("native", "numba", "reference")


def available() -> dict[str, Any]:
    """Say what can run here.

    Returns
    -------
    dict
        ``backends``, those that ``backend=`` accepts besides "auto"; ``isas``, the instruction sets the native
        kernels can run on, weakest first; ``isa``, the one they run on.

    Raises
    ------
    ValueError
        If the environment variable GLOBE_ISA names an instruction set that cannot run here.
    """
    found = [name for name in BACKENDS if name != "numba" or importlib.util.find_spec("numba") is not None]
    return {"backends": found, "isas": _native.runnable_isas(), "isa": _native.active_isa()}


def choose(backend: str) -> str:
    """Resolve "auto": the environment variable GLOBE_BACKEND, or the native kernels.

    Raises
    ------
    ValueError
        If the argument or GLOBE_BACKEND is not a backend, or needs a package that is not installed.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("GLOBE_BACKEND") or "native", "GLOBE_BACKEND"
        if backend == "auto":
            backend = "native"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: found {backend!r}; expected auto, {', '.join(BACKENDS)}")
    if backend == "numba" and importlib.util.find_spec("numba") is None:
        raise ValueError(f"{source}: found 'numba', which is not installed; pip install numba, or use another backend")
    return backend


_default_threads: int | None = None
_MOST_THREADS = 2**31 - 1
_LONG = 0.05  # seconds after which a range is not made longer


def set_num_threads(threads: int | None) -> None:
    """Set how many threads a kernel uses that is not told; None is one for every processor that the process may use.

    Never more run than it is allowed to run on.

    Raises
    ------
    ValueError
        If it is no integer or below 1.
    """
    global _default_threads
    if threads is not None:
        threads = whole("threads", threads, _MOST_THREADS, ", or None for the default")
    _default_threads = threads


def check_threads(threads: int | None) -> int:
    """The number of threads to use, at most one for a processor; None is the default, see :func:`set_num_threads`."""
    if threads is None:
        return min(_default_threads or _MOST_THREADS, usable_processors())
    return min(whole("threads", threads, _MOST_THREADS, ", or None for the default"), affinity())


def run_ranges(task: Callable[[int, int], None], count: int, threads: int, grain: int = 1) -> None:
    """Call ``task(begin, end)`` on ranges that cover ``range(count)``, on several threads.

    For tasks that release the interpreter's lock and whose result for an index does not depend on the range
    it comes in. ``grain`` is the smallest range worth a thread. Ranges grow until one takes long enough to be
    worth its call, so that Ctrl-C, which Python handles between calls on the main thread, is soon heard.
    """
    parts = max(1, min(threads, count // max(grain, 1)))
    ranges = _Ranges(task, count, max(grain, 1), max(grain, count // (4 * parts)))
    if parts == 1:
        ranges.work()
        return
    with ThreadPoolExecutor(parts) as pool:
        try:
            for done in [pool.submit(ranges.work) for _ in range(parts)]:
                done.result()
        finally:
            ranges.stop()


class _Ranges:
    """Ranges of indices that are not done yet."""

    def __init__(self, task: Callable[[int, int], None], count: int, shortest: int, longest: int) -> None:
        self.task, self.count, self.shortest, self.longest = task, count, shortest, longest
        self.begin = 0
        self.lock = threading.Lock()

    def work(self) -> None:
        size = self.shortest
        while True:
            with self.lock:
                begin = self.begin
                self.begin = end = min(begin + size, self.count)
            if begin == end:
                return
            start = time.perf_counter()
            self.task(begin, end)
            if time.perf_counter() - start < _LONG:
                size = min(2 * size, self.longest)

    def stop(self) -> None:
        with self.lock:
            self.begin = self.count
