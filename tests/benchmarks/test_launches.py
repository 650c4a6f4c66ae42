"""benchmarks/launches.py: what a batch asks of a device."""

from __future__ import annotations

import json
from pathlib import Path

import launches
import pytest
from click.testing import CliRunner


@pytest.mark.parametrize("options", [(), ("--without-fp64",)], ids=["fp64", "fp32"])
def test_the_host_reads_once_a_batch(options: tuple[str, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(launches.main, [*options, "--json", str(tmp_path / "found.json")], catch_exceptions=False)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(done.output.splitlines()) == len(found) == 2 * len(launches.STAGES)
    for name, counts in found.items():
        reads = {"loop pass": 1, "joint evaluation": 1, "joint product": 1, "left factors": 2}.get(
            name.partition(",")[0], 0
        )
        assert counts["reads"] == reads, name  # the left factors, and their figures
        assert 0 < counts["operations"] < 300 and 0 < counts["uploads"] < 4
