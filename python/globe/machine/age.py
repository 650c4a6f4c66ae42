"""When this process began."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_STARTED = 19  # of the fields behind the name in /proc/self/stat: clock ticks after the machine was started


def process_age() -> float:
    """Seconds since this process was started, the interpreter's own start included; 0 where Linux does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_STARTED]) / os.sysconf("SC_CLK_TCK"))
    return 0.0
