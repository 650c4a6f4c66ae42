"""Which implementation of a kernel runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from globe import _native
from globe.processors import usable_processors

Backend = Literal["auto", "native", "numba", "reference"]
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


def set_num_threads(threads: int | None) -> None:
    """Set how many threads a kernel uses that is not told; None is one for every processor that the process may use.

    Raises
    ------
    ValueError
        If the number is below 1.
    """
    global _default_threads
    if threads is not None:
        check_threads(threads)
    _default_threads = threads


def check_threads(threads: int | None) -> int:
    """The number of threads to use; None is the default, see :func:`set_num_threads`."""
    if threads is None:
        return _default_threads or usable_processors()
    if threads < 1:
        raise ValueError(f"threads: found {threads}; expected at least 1, or None for the default")
    return int(threads)


def run_ranges(task: Callable[[int, int], None], count: int, threads: int, grain: int = 1) -> None:
    """Call ``task(begin, end)`` on ranges that cover ``range(count)``, on several threads.

    For tasks that release the interpreter's lock and whose result for an index does not depend on the range
    it comes in. ``grain`` is the smallest range worth a thread.
    """
    parts = max(1, min(threads, count // max(grain, 1)))
    if parts == 1:
        task(0, count)
        return
    bounds = [count * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        for _ in pool.map(task, bounds[:-1], bounds[1:]):
            pass
