"""`globe demo` from end to end, on a tiny checkpoint in the place of the pretrained mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner

from checkpoints import make_tiny
from globe.cli import cli


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo")
    make_tiny("mixtral", home / "model")
    return home


def test_the_demo_compresses_and_judges(home: Path) -> None:
    ran = CliRunner().invoke(cli, ["demo", str(home), "--joint-steps", "1", "--max-tokens", "256", "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    names = [stage["name"] for stage in found["stages"]]
    assert names[0] == "model" and names[-2:] == ["export", "evaluate"]
    assert {"index", "calibrate", "gate: joint", "up: joint", "write"} <= set(names)
    assert set(found["relative_error"]) == {"gate", "up"} and 0 < found["ratio"]["touched"] < 1
    assert found["perplexity"]["before"] > 1 and found["perplexity"]["after"] > 1
    assert (home / "factored" / "globe.json").is_file() and not (home / "dense").exists()


def test_the_demo_says_what_it_found(home: Path) -> None:
    ran = CliRunner().invoke(cli, ["demo", str(home), "--joint-steps", "1", "--max-tokens", "256"])
    assert ran.exit_code == 0, ran.output
    for word in ("relative error, gate", "perplexity", "seconds, write", "peak memory", "before:", "after:"):
        assert word in ran.output
