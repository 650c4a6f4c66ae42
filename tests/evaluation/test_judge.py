"""Judged where nobody calibrated: the held-out halves, the warning, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import GlobeError, Settings, compress, report  # noqa: E402
from globe.artifact.card import JUDGED, with_section  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.evaluation.evaluate import evaluate  # noqa: E402
from globe.evaluation.judge import Reading, judge  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from globe.evaluation.perplexity import Evaluation, evaluate_models, geometric_mean  # noqa: E402
from globe.evaluation.record import WORSE, add_to_record, read_record, warning  # noqa: E402
from globe.statistics.held_out import read_held_out  # noqa: E402

HELD_OUT = "globe-held-out.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny mixture and what was made of it, calibrated on a file, its help topics and its own samples."""
    home = tmp_path_factory.mktemp("judged")
    model = make_tiny("mixtral", home / "model")
    notes = home / "notes.txt"
    notes.write_text("ab" * 500 + "cd" * 500, encoding="utf-8")
    calibrate_tiny(model, home / "statistics", text={str(notes): 1, "pydoc:topics": 1, "self": 1}, tokens=1280)
    settings = {"rank": 0.5, "bank_size": 4, "joint_steps": 2, "support": 2, "device": "cpu"}
    compress(model, home / "out", Settings(**settings, calibrate=str(home / "statistics")))
    return model, home / "out"


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def found_of(text: str, ratio: float, *, calibrated: bool) -> Evaluation:
    return Evaluation(10.0 * ratio, 100, 64, text, 0.1, 0.9, 10.0, 1.0, calibrated)


def test_held_out_halves_of_all_texts(made: tuple[Path, Path], out: Path) -> None:
    model, notes = made[0], made[0].parent / "notes.txt"
    judged = judge(out, model, (), Reading(window=64, max_tokens=320))
    names = [f"{notes}, held-out half", "pydoc:topics, held-out half", "self, held-out samples"]
    assert [each.text for each in judged.found] == names and all(each.calibrated for each in judged.found)
    alone = evaluate(out, against=model, text="cd" * 500, window=64, max_tokens=320)
    assert judged.found[0].perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert judged.found[0].kl == pytest.approx(alone.kl, rel=1e-5)
    held_out = read_held_out(out / HELD_OUT)
    assert held_out is not None and held_out.samples is not None
    loaded, tokenizer = load_model(out)
    samples = evaluate_models(loaded, tokenizer, held_out.samples, max_tokens=320)
    assert judged.found[2].perplexity == pytest.approx(samples.perplexity, rel=1e-6)
    count, length = held_out.samples.shape
    assert count > 1 and samples.window == length and samples.tokens == count * (length - 1)
    assert evaluate_models(loaded, tokenizer, held_out.samples, max_tokens=2).tokens == length - 1
    assert read_record(out) == judged.found


def test_what_is_kept(made: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    model, other = made[0], tmp_path / "other.txt"
    other.write_text("Elsewhere nobody calibrated. " * 20, encoding="utf-8")
    reading = Reading(window=64, max_tokens=200)
    first = judge(out, model, (), reading).found
    second = judge(out, model, [other], reading).found
    assert [each.text for each in second] == [str(other)] and not second[0].calibrated
    assert read_record(out) == [*first, *second]
    told = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert told["geometric_mean"] == pytest.approx(geometric_mean([*first, *second]))
    assert [row["ratio"] for row in told["texts"]] == pytest.approx([each.ratio for each in [*first, *second]])
    assert judge(out, model, [other], reading).found[0].perplexity == second[0].perplexity
    assert len(read_record(out)) == len(first) + 1  # a text has one row

    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    next(iter(metrics["files"].values()))["sha256"] = "of other weights"
    (out / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert read_record(out) == []
    assert add_to_record(out, second) == second


def test_another_model_is_not_the_original(made: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    other = make_tiny("mixtral", tmp_path / "other", seed=1)
    found = judge(out, other, (), Reading(window=64, max_tokens=128, note=notes.append)).found
    assert len(found) == 3 and not (out / "evaluation.json").exists()
    assert len(notes) == 1 and "is not the checkpoint that" in notes[0]


def test_a_record_that_cannot_be_written_costs_nothing(made: tuple[Path, Path], out: Path) -> None:
    (out / "evaluation.json").mkdir()
    notes: list[str] = []
    found = judge(out, made[0], [made[0].parent / "notes.txt"], Reading(window=64, note=notes.append)).found
    assert len(found) == 1 and "evaluation.json does not tell of this" in notes[0]


def test_default_text_where_nothing_is_recorded(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(made[0], out, Settings(rank=0.5, bank_size=4, joint_steps=1, support=2, device="cpu", **WEIGHTS_ONLY))
    assert not (out / HELD_OUT).exists()
    judged = judge(out, made[0], (), Reading(window=64, max_tokens=128))
    assert len(judged.found) == 1 and "evaluation half" in judged.found[0].text and judged.warning is None


@pytest.mark.parametrize("worst", [WORSE * 1.2 * 1.001, WORSE * 1.2 * 0.999])
def test_the_rule_of_the_warning(worst: float) -> None:
    best, other = found_of("help", 1.2, calibrated=True), found_of("licences", worst, calibrated=False)
    said = warning([found_of("code", 1.3, calibrated=True), best, other])
    assert (said is not None) == (worst > WORSE * 1.2)
    if said is not None:
        assert "Good on what it has seen, not on other text" in said
        assert "1.60 times the original's on licences, 1.20 times on help" in said
    assert warning([replace(best, calibrated=False), other]) is None
    assert (warning([best, replace(other, calibrated=True)]) is not None) == (worst > WORSE * 1.2)


def test_command_and_report(made: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["eval", str(out), "--against", str(made[0]), "--window", "64", "--max-tokens", "200"]
    told = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)
    assert len(told["texts"]) == 3 and all(row["calibrated"] for row in told["texts"]) and "warning" in told
    rows = [found_of("help, held-out half", 1.2, calibrated=True), found_of("a | b", 2.4, calibrated=False)]
    monkeypatch.setattr("globe.evaluation.judge.evaluate_models", lambda *_, **__: rows[1])
    add_to_record(out, rows[:1])
    shown = CliRunner().invoke(cli, [*command, "--text", str(made[0].parent / "notes.txt")])
    assert "Good on what it has seen, not on other text" in " ".join(shown.stdout.split()), shown.output

    card = (out / "README.md").read_text(encoding="utf-8")
    page = report(out).read_text(encoding="utf-8")
    assert 'id="judged"' in page and "Good on what it has seen" in page and "a | b" in page
    judged_card = (out / "README.md").read_text(encoding="utf-8")
    assert judged_card.startswith(card.rstrip()) and f"## {JUDGED}" in judged_card
    assert "| a \\| b | 100 | 10 | 24 | 2.4 | 0.1 | 90 % |" in judged_card and "**Good on" in judged_card
    report(out)
    assert (out / "README.md").read_text(encoding="utf-8") == judged_card
    (out / "evaluation.json").unlink()
    assert 'id="judged"' not in report(out).read_text(encoding="utf-8")
    assert (out / "README.md").read_text(encoding="utf-8").rstrip() == card.rstrip()


def test_sections_of_a_card() -> None:
    card = "# Model\n\nText.\n\n## Other\n\nMore.\n"
    once = with_section(card, "Judged", "one")
    assert once == card + "\n## Judged\n\none\n"
    followed = once + "\n## Healed\n\nLater.\n"
    assert with_section(followed, "Judged", "two") == card + "\n## Judged\n\ntwo\n\n## Healed\n\nLater.\n"
    assert with_section(followed, "Judged", None) == card + "\n## Healed\n\nLater.\n"
    assert with_section(card, "Judged", None) == card


def test_damaged_record(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    weights = {name: file["sha256"] for name, file in metrics["files"].items()}
    (out / "evaluation.json").write_text(json.dumps({"weights": weights, "texts": [{}]}), encoding="utf-8")
    with pytest.raises(GlobeError, match="evaluation.json: damaged; remove it"):
        read_record(out)


def test_infinite_figures_are_kept(out: Path) -> None:
    rows = [found_of("help", 1.2, calibrated=True), found_of("other", float("inf"), calibrated=False)]
    add_to_record(out, rows)
    assert read_record(out) == rows and "Infinity" not in (out / "evaluation.json").read_text(encoding="utf-8")
    assert warning(read_record(out)) is not None
