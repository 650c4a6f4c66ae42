"""What the control groups that hold the process allow it: processors and memory, versions 1 and 2, nested groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROCESS = Path("/proc/self")
_UNLIMITED = 1 << 60  # version 1 says "no limit" with the largest multiple of a page


def groups(controller: str, process: Path = PROCESS) -> Iterator[Path]:
    """The directories of the groups that a controller counts the process in: its own, then those above.

    A process is in one group of every hierarchy. A hierarchy of version 2 serves all controllers, one of version 1
    those that its mount names; what is visible of it begins at the mount. Nothing where there are no control groups.
    """
    own = _own_groups(process)
    for mount, root, kind, options in _mounts(process):
        path = own.get("") if kind == "cgroup2" else own.get(controller) if controller in options else None
        if path is None:
            continue
        inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        directory = mount if ".." in inside.parts else mount / inside
        yield directory
        while directory != mount:
            directory = directory.parent
            yield directory


def processor_quota(process: Path = PROCESS) -> float | None:
    """Processors' worth of time per period, the least of all groups; None if no group has a limit."""
    found = []
    for group in groups("cpu", process):
        quota, period = [*_words(group / "cpu.max"), "", ""][:2]
        if not quota:
            quota, period = ((_words(group / f"cpu.cfs_{name}_us") or [""])[0] for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(process: Path = PROCESS) -> int | None:
    """Bytes of memory that the groups allow, the least of all; None if no group has a limit."""
    found = []
    for group in groups("memory", process):
        limit = (_words(group / "memory.max") or _words(group / "memory.limit_in_bytes") or [""])[0]
        if limit.isdigit() and int(limit) < _UNLIMITED:
            found.append(int(limit))
    return min(found, default=None)


def throttled_share(process: Path = PROCESS) -> float:
    """The largest share of periods, over the groups, in which the quota was used up before the period's end."""
    shares = [0.0]
    for group in groups("cpu", process):
        words = _words(group / "cpu.stat")
        counts = dict(zip(words[::2], words[1::2], strict=False))
        periods = int(counts.get("nr_periods", 0))
        if periods > 0:
            shares.append(int(counts.get("nr_throttled", 0)) / periods)
    return max(shares)


def _own_groups(process: Path) -> dict[str, str]:
    """The group's path by controller; that of version 2 under the empty name."""
    found = {}
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _mounts(process: Path) -> Iterator[tuple[Path, str, str, list[str]]]:
    """Where control groups are mounted: the place, the group that is mounted there, the type, the options."""
    for line in _lines(process / "mountinfo"):
        place, _, kind = line.partition(" - ")
        if kind.startswith("cgroup"):
            root, mount = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word) for word in place.split()[3:5])
            yield Path(mount), root, kind.split()[0], kind.split()[-1].split(",")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or a file of the other version
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
