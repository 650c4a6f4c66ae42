"""How many processors this process may really use, and whether others use them too."""

from __future__ import annotations

import functools
import math
import os

from globe.machine.control_groups import processor_quota, throttled_share

_CROWDED = 1.25  # runnable threads for each processor of the machine
_THROTTLED = 0.1  # of the periods


def affinity() -> int:
    """Processors that the process is allowed to run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def usable_processors() -> int:
    """The number of threads that is worth having: the affinity, or the control groups' quota rounded up, if less.

    Looked up once in a process.
    """
    quota = processor_quota()
    return max(1, min(affinity(), math.ceil(quota) if quota is not None else affinity()))


def oversubscribed() -> bool:
    """Whether the machine has had more runnable threads than processors, or the quota has held the process back.

    The first is judged by the load average of the last minute, which counts the whole machine.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return load > _CROWDED * (os.cpu_count() or 1) or throttled_share() > _THROTTLED
