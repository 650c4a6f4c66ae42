"""The age of a process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from globe.machine.age import process_age

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux alone says when a process began")


@LINUX
def test_a_process_knows_when_it_began():
    code = (
        "import json, time; from globe.machine.age import process_age; print(json.dumps([process_age(), time.time()]))"
    )
    before = time.time()
    age, then = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert before - 0.1 < then - age < then and 0 < age
    first = process_age()
    assert 0 < first <= process_age()


def test_where_nobody_knows_it_is_none(monkeypatch):
    def missing(*given, **options):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert process_age() == 0.0
