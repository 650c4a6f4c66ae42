"""Quotas of control groups, read from files as Linux writes them, and the threads that follow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from globe.machine import processors
from globe.machine.control_groups import groups, memory_limit, processor_quota, throttled_share


def proc(root: Path, cgroup: str, *mounts: tuple[str, str, str, str]) -> Path:
    """Write cgroup and mountinfo of a process; a mount is what is mounted, its folder in `root`, type and options."""
    lines = []
    for number, (inside, folder, kind, options) in enumerate(mounts):
        place = str(root / folder).replace(" ", "\\040")
        lines.append(f"{30 + number} 1 0:{number} {inside} {place} rw,relatime - {kind} {kind} {options}\n")
    (root / "proc").mkdir()
    (root / "proc" / "mountinfo").write_text("25 1 0:1 / /proc rw - proc proc rw\n" + "".join(lines))
    (root / "proc" / "cgroup").write_text(cgroup)
    return root / "proc"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "outer", "found"),
    [
        ("max 100000", "max 100000", None),
        ("150000 100000", "max 100000", 1.5),
        ("max 100000", "50000 100000", 0.5),
        ("400000 100000", "100000 50000", 2.0),
    ],
)
def test_version_2_takes_the_least_along_the_path(own: str, outer: str, found: float | None, tmp_path: Path) -> None:
    process = proc(tmp_path, "0::/outer/own\n", ("/", "a b", "cgroup2", "rw"))
    put(tmp_path / "a b" / "outer" / "own" / "cpu.max", f"{own}\n")
    put(tmp_path / "a b" / "outer" / "cpu.max", f"{outer}\n")
    put(tmp_path / "a b" / "other" / "cpu.max", "1000 100000\n")
    assert processor_quota(process) == found


def test_version_1_in_a_container(tmp_path: Path) -> None:
    """The mount shows the container's own group as its root, while /proc/self/cgroup has the machine's path."""
    mount = ("/docker/abc", "cpu", "cgroup", "rw,cpu,cpuacct")
    process = proc(tmp_path, "4:cpu,cpuacct:/docker/abc/job\n1:memory:/\n0::/\n", mount)
    put(tmp_path / "cpu" / "job" / "cpu.cfs_quota_us", "-1\n")
    put(tmp_path / "cpu" / "job" / "cpu.cfs_period_us", "100000\n")
    put(tmp_path / "cpu" / "cpu.cfs_quota_us", "250000\n")
    put(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert processor_quota(process) == 2.5
    assert list(groups("cpu", process)) == [tmp_path / "cpu" / "job", tmp_path / "cpu"]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/of/the/mount"])
def test_a_group_out_of_sight_leaves_the_mount(path: str, tmp_path: Path) -> None:
    process = proc(tmp_path, f"0::{path}\n", ("/", "unified", "cgroup2", "rw"))
    put(tmp_path / "unified" / "cpu.max", "300000 100000\n")
    assert processor_quota(process) == 3.0


def test_memory_and_throttling(tmp_path: Path) -> None:
    mounts = [("/", "cpu", "cgroup", "rw,cpu"), ("/", "memory", "cgroup", "rw,memory")]
    process = proc(tmp_path, "2:memory:/a\n1:cpu:/a\n", *mounts)
    put(tmp_path / "memory" / "a" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit(process) is None
    put(tmp_path / "memory" / "memory.limit_in_bytes", f"{3 << 30}\n")
    assert memory_limit(process) == 3 << 30
    assert throttled_share(process) == 0.0
    put(tmp_path / "cpu" / "a" / "cpu.stat", "nr_periods 40\nnr_throttled 10\nthrottled_time 5\n")
    assert throttled_share(process) == 0.25


def test_no_control_groups(tmp_path: Path) -> None:
    assert processor_quota(tmp_path) is None and memory_limit(tmp_path) is None and throttled_share(tmp_path) == 0


@pytest.mark.parametrize(("allowed", "quota", "found"), [(8, None, 8), (8, 1.5, 2), (8, 0.3, 1), (2, 6.0, 2)])
def test_usable_processors(allowed: int, quota: float | None, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "affinity", lambda: allowed)
    monkeypatch.setattr(processors, "processor_quota", lambda: quota)
    assert processors.usable_processors.__wrapped__() == found


def test_threads_by_default_are_no_more_than_usable_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from globe.compute import devices
    from globe.kernels import backends

    monkeypatch.setattr(backends, "usable_processors", lambda: 3)
    monkeypatch.setattr(backends, "_default_threads", None)
    assert backends.check_threads(None) == 3
    monkeypatch.setattr(devices, "usable_processors", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        devices.set_threads(None)
        assert (torch.get_num_threads(), backends.check_threads(None)) == (1, 1)
        devices.set_threads(2)
        assert (torch.get_num_threads(), backends.check_threads(None)) == (2, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("load", "share", "found"), [(2.0, 0.0, False), (2.6, 0.0, True), (0.1, 0.5, True)])
def test_oversubscribed(load: float, share: float, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(processors, "throttled_share", lambda: share)
    assert processors.oversubscribed() is found
