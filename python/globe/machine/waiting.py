"""How threads of OpenMP and OpenBLAS wait for work: asleep, so that a busy machine is not busier for them.

A thread that spins while it waits takes its processor from one that has work. Where processors are short, an OpenMP
region of microseconds then lasts as long as the scheduler's time slice.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from globe.machine.processors import oversubscribed

_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # GNU's (spin count 0), LLVM's and Intel's runtimes
_OTHERS = ("GOMP_SPINCOUNT", "KMP_LIBRARY")  # in which a user may have said how to wait
_OPENBLAS = {"OPENBLAS_THREAD_TIMEOUT": "4"}  # NumPy's and SciPy's: 2^4 cycles of spinning instead of 2^26
VARIABLES = (*_OPENMP, *_OTHERS, *_OPENBLAS)

_set_here: tuple[str, ...] = ()
_torch_was_first = False
_told = False


def wait_passively() -> None:
    """Let threads sleep while they wait, as far as the user has not said otherwise and the libraries are not loaded.

    The runtimes read the environment as they are loaded: torch brings OpenMP, NumPy brings OpenBLAS.
    """
    global _set_here, _torch_was_first
    _torch_was_first = "torch" in sys.modules
    wanted: dict[str, str] = {}
    if not _torch_was_first and not any(name in os.environ for name in (*_OPENMP, *_OTHERS)):
        wanted.update(_OPENMP)
    if "numpy" not in sys.modules and not any(name in os.environ for name in _OPENBLAS):
        wanted.update(_OPENBLAS)
    os.environ.update(wanted)
    _set_here = tuple(wanted)


def waiting_policy() -> dict[str, Any]:
    """How threads of OpenMP wait: ``policy`` (passive, active, or the runtime's default), who set it, variables."""
    return {
        "policy": _policy(),
        "set_by": "globe" if any(name in _set_here for name in _OPENMP) else "user" if _asked() else None,
        "torch_loaded_first": _torch_was_first,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def warn_of_spinning() -> None:
    """Say once, in one line, that threads spin on a machine that has no processor to spare for it."""
    global _told
    if _told or not _torch_was_first or _policy() == "passive" or not oversubscribed():
        return
    _told = True
    print(
        "globe: torch was imported before globe, so its idle OpenMP threads spin, and this machine has more to run "
        "than processors: import globe first or set OMP_WAIT_POLICY=PASSIVE; this can be many times slower",
        file=sys.stderr,
    )


def _asked() -> bool:
    return any(name in os.environ for name in (*_OPENMP, *_OTHERS))


def _policy() -> str:
    count, policy = os.environ.get("GOMP_SPINCOUNT", ""), os.environ.get("OMP_WAIT_POLICY", "").lower()
    if count.isdigit():
        return "passive" if int(count) == 0 else "active"
    if policy in ("passive", "active"):
        return policy
    return "passive" if os.environ.get("KMP_BLOCKTIME") == "0" else "default"
