"""`globe demo` from end to end, on a tiny checkpoint in the place of the pretrained mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner
from rich.console import Console

from checkpoints import make_tiny
from globe import UsageError
from globe.cli import cli
from globe.demo.run import COSTS, PROMPTS, Choices
from globe.demo.show import cost_line, demo_table, sentences_table
from globe.healing import texts

FAST = ("--joint-steps", "1", "--max-tokens", "128", "--calibration-tokens", "2048")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo")
    make_tiny("mixtral", home / "model")
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    ran = CliRunner().invoke(cli, ["demo", str(home), *FAST, "--families", "gate,up", "--correct", "down", "--json"])
    assert ran.exit_code == 0, ran.output
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


def test_the_demo_compresses_and_judges(home: Path, found: dict[str, Any]) -> None:
    names = [stage["name"] for stage in found["stages"]]
    assert names[0] == "model" and names[-1] == "evaluate"
    assert {"index", "sample", "calibrate", "gate: joint", "up: joint", "correct", "write"} <= set(names)
    assert set(found["relative_error"]) == {"gate", "up"} and 0 < found["ratio"]["touched"] < 1
    assert len(found["texts"]) >= 2 and all(row["calibrated"] for row in found["texts"])
    for row in found["texts"]:
        assert row["ratio"] == pytest.approx(row["perplexity"] / row["reference_perplexity"])
    assert [each["prompt"] for each in found["sentences"]] == list(PROMPTS) and len(PROMPTS) == 3
    assert set(found["seconds"]) == set(COSTS) and found["seconds"]["healing"] == 0 < found["seconds"]["corrections"]
    assert sum(found["seconds"].values()) == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert (home / "factored" / "evaluation.json").is_file()
    assert 'id="judged"' in (home / "factored" / "report.html").read_text(encoding="utf-8")


def test_the_demo_heals(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = texts.given_texts
    few = lambda options: {name: text[:8192] for name, text in given(options).items()}  # noqa: E731
    monkeypatch.setattr("globe.healing.heal.given_texts", few)
    (tmp_path / "model").symlink_to(home / "model")
    options = ("--heal-minutes", "0.02")
    ran = CliRunner().invoke(cli, ["demo", str(tmp_path), *FAST, *options, "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["seconds"]["healing"] > 0 == found["seconds"]["corrections"]
    assert "healing" in json.loads((tmp_path / "factored" / "metrics.json").read_text(encoding="utf-8")) or (
        "heal" in [stage["name"] for stage in found["stages"]]
    )
    with pytest.raises(UsageError, match="heal_minutes is -1"):
        Choices(heal_minutes=-1)


def test_the_demo_says_what_it_found(found: dict[str, Any]) -> None:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        for each in (demo_table(found), sentences_table(found), cost_line(found)):
            console.print(each)
    said = captured.get()
    for word in ("gate and up factored", "relative error, gate", "perplexity, pydoc:topics, held-out half",
                 "geometric mean", "The capital of France is …", "corrections", "in all", "at the peak"):  # fmt: skip
        assert word in said, word
