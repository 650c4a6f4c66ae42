"""Threads wait asleep: what is set before which library is loaded, what the user is told, and processor time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from globe.machine.waiting import VARIABLES

BUSY = "while True: pass"


def run(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**clean, **given}, capture_output=True, text=True, check=True)


def policy(imports: str, **given: str) -> dict[str, Any]:
    told = "print(json.dumps(waiting_policy()))"
    code = f"import {imports}\nimport json\nfrom globe.machine.waiting import waiting_policy\n{told}"
    found: dict[str, Any] = json.loads(run(code, **given).stdout)
    return found


@pytest.mark.parametrize("imports", ["globe", "globe.cli", "globe, torch"])
def test_waiting_is_passive_where_torch_comes_later(imports: str) -> None:
    found = policy(imports)
    assert (found["policy"], found["set_by"], found["torch_loaded_first"]) == ("passive", "globe", False)
    assert found["variables"] == {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "active"),
        ({"GOMP_SPINCOUNT": "1000"}, "active"),
        ({"GOMP_SPINCOUNT": "0"}, "passive"),
        ({"KMP_BLOCKTIME": "20"}, "default"),
    ],
)
def test_what_the_user_set_stays(given: dict[str, str], told: str) -> None:
    found = policy("globe", **given)
    assert (found["policy"], found["set_by"]) == (told, "user")
    assert found["variables"] == {**given, "OPENBLAS_THREAD_TIMEOUT": "4"}


def test_nothing_is_set_once_torch_is_loaded() -> None:
    found = policy("torch, globe")
    assert (found["policy"], found["set_by"], found["torch_loaded_first"]) == ("default", None, True)
    assert found["variables"].keys() <= {"OPENBLAS_THREAD_TIMEOUT"}


@pytest.mark.parametrize(
    ("imports", "load", "told"), [("torch, globe", 99, 1), ("torch, globe", 0, 0), ("globe, torch", 99, 0)]
)
def test_one_line_where_threads_spin_on_a_crowded_machine(imports: str, load: int, told: int) -> None:
    code = (
        f"import {imports}\nimport os\nos.cpu_count = lambda: 2\nos.getloadavg = lambda: ({load}, 0, 0)\n"
        "from globe.machine import processors\nprocessors.throttled_share = lambda: 0.0\n"
        "from globe.compute.devices import set_threads\nset_threads(1)\nset_threads(None)\n"
    )
    assert run(code).stderr.count("import globe first or set OMP_WAIT_POLICY=PASSIVE") == told


def processor_seconds(command: list[str]) -> float:
    clean = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "OMP_NUM_THREADS")}
    child = subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_a_busy_machine_costs_little_more_processor_time(tiny_olmoe: Path, tmp_path: Path) -> None:
    sizes = ["--families", "gate", "--rank", "0.75", "--bank-ratio", "0.25", "--calibrate", "none", "-q"]
    start = [sys.executable, "-m", "globe", "compress", str(tiny_olmoe)]
    idle = processor_seconds([*start, str(tmp_path / "idle"), *sizes])
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        busy = processor_seconds([*start, str(tmp_path / "busy"), *sizes])
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert busy <= 1.5 * idle
