"""benchmarks/quality.py from end to end on tiny checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quality
import quality_front
import quality_report
import quality_runs
import quality_texts
import torch
from baselines import svd
from click.testing import CliRunner
from rich.console import Console

from checkpoints import make_tiny
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.layouts import FAMILIES
from globe.settings.yaml_file import read_settings
from globe.statistics.calibration import LayerStatistics, load_calibration, save_calibration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2_moe", tmp_path_factory.mktemp("quality") / "model", shards=2)


def write_statistics(file: Path, model: Path) -> Path:
    """A calibration file of random moments."""
    family = Checkpoint(model).family("gate")
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for number in sorted({expert.layer for expert in family.experts}):
        experts = sum(expert.layer == number for expert in family.experts)
        data = torch.randn(3 * family.d, family.d, generator=generator) * torch.logspace(0, 1, family.d)
        ones = torch.ones(experts, family.p)
        layers[number] = LayerStatistics(
            moment=data.mT @ data / len(data),
            residual=torch.tensor(1.0),
            share=torch.ones(experts),
            counts=torch.ones(experts, dtype=torch.int64),
            diagonal=torch.ones(experts, family.d),
            gate_rows=ones,
            up_rows=ones.clone(),
            hidden=torch.rand(experts, family.p, generator=generator),
        )
    save_calibration(file, layers, {})
    return file


def test_two_methods_from_end_to_end(model: Path, tmp_path: Path) -> None:
    statistics = write_statistics(tmp_path / "calibration.safetensors", model)
    saved, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    options = ["--methods", "svd,svd@inputs", "--ratio", "0.6", "--calibration", str(statistics), "--tokens", "256"]
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    prose = tmp_path / "prose.txt"
    prose.write_text("It was the best of times, it was the worst of times. " * 10, encoding="utf-8")
    options += ["--text", str(prose), "--window", "64", "--json", str(saved), "--plot", str(plot), "--threads", "1"]
    ran = CliRunner().invoke(quality.main, [str(model), *options], catch_exceptions=False)
    assert ran.exit_code == 0 and "the original: perplexity help topics" in ran.output
    assert "not judged on prose" not in ran.output
    plain, whitened = json.loads(saved.read_text(encoding="utf-8"))["rows"]
    assert (plain["metric"], whitened["metric"]) == ("weights", "inputs")
    budget = 2 * 0.6 * 2 * 2 * 6 * 32 * 64
    for row in (plain, whitened):
        assert 0.9 * budget < row["stored_bytes"] <= budget and row["seconds"] > 0
        assert 0 < row["relative_error"] < 1 and 0 < row["weighted_error"] < 1 and row["kl"] > 0
        assert set(row["ratios"]) >= {"help topics", "docstrings", "code", "prose"} and min(row["ratios"].values()) > 0
        assert row["geometric_mean"] == pytest.approx(math.prod(row["ratios"].values()) ** (1 / len(row["ratios"])))
        assert 0 < row["top1_agreement"] < 1 and row["peak_rss_bytes"] > 100 << 20
    assert plain["relative_error"] < whitened["relative_error"]
    assert whitened["weighted_error"] < plain["weighted_error"]
    assert "activation-weighted error" in plot.read_text(encoding="utf-8")


def test_bytes_against_perplexity(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    saved, plot = tmp_path / "rows.json", tmp_path / "front.svg"
    options = ["--ratio", "0.2,0.5", "--calibration", "none", "--tokens", "128", "--window", "64", "--threads", "1"]
    options += ["--json", str(saved), "--keep", "--front", str(plot)]
    for methods, count in (("rtn:4g32", 1), ("rtn:4g32,svd:4", 3)):
        ran = CliRunner().invoke(quality.main, [str(model), *options, "--methods", methods], catch_exceptions=False)
        rows = json.loads(saved.read_text(encoding="utf-8"))["rows"]
        assert ran.exit_code == 0 and len(rows) == count
        assert ran.stderr.count("rtn:4g32@weights:") == (count == 1)  # not run again
    shares = [quality_front.share(row) for row in rows]
    assert shares[0] == pytest.approx(4.5 / 16) and shares[1] <= 0.2 < shares[2] <= 0.5
    assert [row["ratio"] for row in rows] == [None, 0.2, 0.5]
    table = plot.with_suffix(".md").read_text(encoding="utf-8")
    assert (
        table.count("\n| ") == 4 and "| rtn:4g32 | weights | 0.281 |" in table and "bytes over bf16" in plot.read_text()
    )
    refused = CliRunner().invoke(quality.main, [str(model), *options, "--methods", "rtn:8", "--tokens", "64"])
    assert refused.exit_code == 2 and "tokens is 128 in it, 64 is asked for" in refused.output


def test_the_front_is_what_nothing_undercuts() -> None:
    points = [(10, 3.0), (20, 1.5), (20, 1.4), (30, 1.6), (40, 1.1), (50, 1.1)]
    rows = [
        {"method": "svd", "metric": "weights", "stored_bytes": size, "dense_bytes": 100, "geometric_mean": times}
        for size, times in points
    ]
    found = quality_front.front(rows, "geometric mean")
    assert [(row["stored_bytes"], row["geometric_mean"]) for row in found] == [(10, 3.0), (20, 1.4), (40, 1.1)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["qwen3_moe", "qwen3_5_moe"])
def test_the_dense_checkpoint_differs_in_the_experts_alone(layout: str, name: str, tmp_path: Path) -> None:
    model = make_tiny(layout, tmp_path / "model")
    checkpoint, dense = Checkpoint(model), tmp_path / "dense"
    statistics = load_calibration(write_statistics(tmp_path / "calibration.safetensors", model))
    row = quality_runs.run_baseline(checkpoint, dense, "svd", "inputs", [name], 0.6, statistics, None, lambda: 0.0)
    written = Checkpoint(dense)
    assert {tensor: (info.dtype, info.shape) for tensor, info in written.tensors.items()} == {
        tensor: (info.dtype, info.shape) for tensor, info in checkpoint.tensors.items()
    }
    number = -1
    for layer in quality_runs.Layers(checkpoint.family(name), "inputs", statistics):
        assert (layer.rows is None, layer.columns is None) == ((False, True) if name == "down" else (True, False))
        rank = row["about"][name]["rank"]
        for wanted in svd.truncate(layer.weights, rank, layer.columns, layer.rows):
            assert torch.equal(written.family(name).read(number := number + 1), wanted.bfloat16())
    for other in set(FAMILIES) - {name}:
        same, copy = checkpoint.family(other), written.family(other)
        assert all(torch.equal(same.read(number), copy.read(number)) for number in range(len(same)))
    assert (dense / "tokenizer.json").is_file()
    found = quality_runs.measure_error(checkpoint, dense, [name], statistics)
    assert 0 < found["weighted_error"] < found["relative_error"] < 0.6


def test_a_row_of_ours_has_its_history(model: Path, tmp_path: Path) -> None:
    checkpoint, dense = Checkpoint(model), tmp_path / "dense"
    options = ["--rank", "12", "--bank-size", "4", "--outer-loops", "2", "--solver", "alternate", "--calibrate", "none"]
    row: dict[str, Any] = quality_runs.run_globe(checkpoint, dense, ["gate", "up"], options, 1, "wall")
    row |= quality_runs.measure_error(checkpoint, dense, ["gate", "up"], None)
    stored = 2 * 2 * (12 * 32 * 12 + 4 * 12 * 64)
    assert stored < row["stored_bytes"] < 1.2 * stored and row["file_bytes"] > stored
    row |= {"method": "globe-alternate", "metric": "weights"}
    points = quality_report.curves([row], "relative_error")["globe-alternate, weights"]
    assert len(points) == 3 and points == sorted(points)
    assert points[-1] == (row["seconds"], row["relative_error"])
    assert points[-2][1] == pytest.approx(row["relative_error"], rel=0.02)


def test_mobe_is_given_multiples_of_our_time() -> None:
    def row(method: str, metric: str, seconds: float) -> dict[str, Any]:
        return {"method": method, "metric": metric, "seconds": seconds}

    rows = [
        row("globe-alternate", "inputs", 40.0),
        row("globe-joint", "inputs", 50.0),
        row("globe-joint", "weights", 9),
    ]
    assert quality.budgets(rows, "mobe-silu", "inputs", [1, 3, 10], 120) == [50, 120]
    assert quality.budgets(rows, "mobe-silu", "weights", [1, 3, 10], 120) == [9, 27, 90]
    assert quality.budgets([], "mobe-silu", "weights", [1, 3, 10], 120) == [120]
    assert quality.budgets(rows, "svd", "weights", [1, 3, 10], 120) == [None]
    failed = [{"method": "globe-joint", "metric": "inputs", "error": "no such option"}]
    assert quality.budgets(failed, "mobe-silu", "inputs", [1, 3], 60) == [60]


def test_ours_run_first_and_unknown_methods_are_refused(tmp_path: Path) -> None:
    found = quality.parse("svd, svd@inputs,globe-joint@inputs,svd")
    assert found == [("globe-joint", "inputs"), ("svd", "weights"), ("svd", "inputs")]
    assert len(quality.parse(quality.DEFAULT)) == 19
    config = tmp_path / "globe.yaml"
    for metric, calibrate in (("weights", "none"), ("inputs", "FILE"), ("both", "FILE")):
        options = quality.globe_options("globe-joint", metric, 0.5, "FILE", {"joint_steps": 9}, config)
        assert options == ["--solver", "joint", "--ratio", "0.5", "--calibrate", calibrate, "--config", str(config)]
        settings = read_settings(config, {})
        assert settings.joint_steps == 9 and settings.metric_rows == settings.metric_layers == (metric != "inputs")
    for given, atoms in (({}, 8), ({"atom_bits": 4}, 4)):
        options = quality.globe_options("globe-joint:4g64", "both", 0.2, "FILE", given, config)
        settings = read_settings(config, {})
        assert options[1:4] == ["joint", "--ratio", "0.2"] and settings.stored_bits == (4, atoms)
        assert settings.group_size == 64
    assert set(quality.parse(quality.BITS)) >= {("gptq:3g32", "inputs"), ("globe-joint:4", "both"), ("svd:8", "inputs")}
    for wrong, told in (
        ("rtn", "expected 2, 3, 4 or 8"),
        ("svd:5", "expected 2, 3"),
        ("d2:8", "no form in fewer bits"),
    ):
        with pytest.raises(quality.click.UsageError, match=told):
            quality.parse(wrong)
    for wrong in ("magic", "svd@magic", "globe@both"):
        with pytest.raises(quality.click.UsageError, match=r"is not known; expected NAME\[:BITS\]"):
            quality.parse(wrong)


def test_a_method_that_cannot_run_has_its_reason_in_the_table() -> None:
    console = Console(record=True, width=160)
    quality_report.show([{"method": "svd", "metric": "inputs", "error": "needs activation statistics"}], console)
    assert "svd@inputs: needs activation statistics" in console.export_text()


def test_texts_of_several_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    quality_texts.main(folder)
    said = capsys.readouterr().out
    for name, text in quality_texts.texts().items():
        file = folder / f"{name.replace(' ', '-')}.txt"
        assert file.is_file() == bool(text) and (f"{name}: not on this machine" in said) != bool(text)
        assert not text or (len(text) > 40_000 and file.read_text(encoding="utf-8") == text)
    assert quality_texts.licences(tmp_path) == ""


def test_a_text_of_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_texts, "texts", lambda: {"code": "x", "licences": ""})
    file = tmp_path / "code.txt"
    file.write_text("y", encoding="utf-8")
    with pytest.raises(quality.click.UsageError, match="there is a text code already"):
        quality.judged_on([file])
    assert quality.judged_on([]) == {"code": "x"}
