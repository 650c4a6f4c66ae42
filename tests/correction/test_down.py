"""`down` refitted to the original layers' output: what changes, that it helps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from globe import Settings, calibrate, compress, export, inspect  # noqa: E402
from globe.artifact import write as writing  # noqa: E402
from globe.artifact.factored import left_name  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.correction import down as correction  # noqa: E402
from globe.correction import refit  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.pipeline import compress as pipeline  # noqa: E402
from globe.statistics.calibration import load_calibration, save_calibration  # noqa: E402
from globe.statistics.texts import evaluation_text  # noqa: E402

LAYOUTS = ("mixtral", "qwen2_moe", "deepseek_v3", "qwen3_5_moe", "granitemoe")
SMALL: dict[str, Any] = {"rank": 0.25, "bank_size": 2, "joint_steps": 2, "device": "cpu", "families": ("gate", "up")}
FAMILIES: dict[str, Any] = {"families": ("gate", "up", "down")}
FACTORED: dict[str, Any] = {**FAMILIES, "rank": 0.5}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A tiny checkpoint of a layout and its statistics."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(layout: str) -> tuple[Path, Path]:
        if layout not in made:
            folder = tmp_path_factory.mktemp(layout)
            model = make_tiny(layout, folder / "model", shards=2)
            if layout == "granitemoe":  # which multiplies what its experts make
                config = json.loads((model / "config.json").read_text())
                (model / "config.json").write_text(json.dumps({**config, "residual_multiplier": 0.4}))
            calibrate(model, folder / "statistics", text=evaluation_text("calibration"), tokens=4096, window=64)
            made[layout] = model, folder / "statistics"
        return made[layout]

    return make


def _tensors(directory: Path) -> dict[str, Any]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def _last_states(directory: Path) -> Any:
    """What the decoder makes of a text that nobody calibrated on, before its last norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(evaluation_text("evaluation")[:2048], verbose=False)["input_ids"][:2048]).view(32, 64)
    seen = []
    model.base_model.layers[-1].register_forward_hook(
        lambda _, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_layer_comes_nearer_to_the_original(
    layout: str, calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, statistics = calibrated(layout)
    settings = {**SMALL, "calibrate": str(statistics)}
    compress(model, tmp_path / "plain", Settings(**settings))
    found = compress(model, tmp_path / "out", Settings(**settings, correct="down"))
    wanted = _last_states(model)
    distances = {}
    for name in ("plain", "out"):
        export(tmp_path / name, tmp_path / f"{name}-dense")
        distances[name] = float((_last_states(tmp_path / f"{name}-dense") - wanted).norm())
    assert distances["out"] < 0.97 * distances["plain"], distances

    told = found.metrics["corrections"]
    gates = Checkpoint(model).family("gate")
    assert [line["layer"] for line in told] == sorted({expert.layer for expert in gates.experts})
    assert all(line["after"] <= line["before"] for line in told)
    assert any(line["after"] < line["before"] for line in told)

    before, after, plain = (_tensors(folder) for folder in (model, tmp_path / "out", tmp_path / "plain"))
    changed = set(json.loads((tmp_path / "out" / "globe.json").read_text())["changed"])
    assert changed == {expert.tensor for expert in Checkpoint(model).family("down").experts}
    assert json.loads((tmp_path / "plain" / "globe.json").read_text())["changed"] == []
    for name, value in before.items():
        if name in after:
            assert value.dtype == after[name].dtype and value.shape == after[name].shape
            assert torch.equal(value, after[name]) or name in changed, name
    assert any(not torch.equal(before[name], after[name]) for name in changed)
    assert all(torch.equal(plain[name], after[name]) for name in plain if name not in changed)
    dense = _tensors(tmp_path / "out-dense")
    assert all(torch.equal(dense[name], after[name]) for name in changed)


def test_the_errors_told_are_those_of_the_streams(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The last layer's, from the dense export's own forward on the windows that were held out."""
    model, statistics = calibrated("mixtral")
    found = compress(model, tmp_path / "out", Settings(**SMALL, calibrate=str(statistics), correct="down"))
    export(tmp_path / "out", tmp_path / "dense")
    windows = load_calibration(statistics).tokens("windows")
    assert windows is not None
    states = []
    for directory in (model, tmp_path / "dense"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        seen: list[Any] = []
        loaded.model.layers[-1].register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            loaded(input_ids=windows[3::4], use_cache=False)
        states.append(seen[0].flatten(0, 1))
    lacking = (states[0] - states[1]).square().sum(1) / states[0].square().mean(1)
    assert found.metrics["corrections"][-1]["after"] == pytest.approx(float(lacking.sum()), rel=0.03)


def test_groups_of_experts_come_after_each_other(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, statistics = calibrated("mixtral")
    settings = Settings(**SMALL, calibrate=str(statistics), correct="down")
    together = compress(model, tmp_path / "together", settings).metrics["corrections"]
    monkeypatch.setattr(refit, "WIDEST", 1)
    alone = compress(model, tmp_path / "alone", settings).metrics["corrections"]
    assert len(alone[0]["ridges"]) == Checkpoint(model).config["num_local_experts"]
    assert alone[-1]["after"] < alone[-1]["before"]
    assert together[0]["after"] <= alone[0]["after"] * 1.02  # one after the other is no better than together


def test_a_run_stopped_behind_it_goes_on_to_the_same_bytes(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, statistics = calibrated("mixtral")
    settings = Settings(**SMALL, calibrate=str(statistics), correct="down")
    whole = compress(model, tmp_path / "whole", settings)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "out", settings)
    with monkeypatch.context() as patch:
        patch.setattr(correction, "Layerwise", stop)  # nothing is run again
        again = compress(model, tmp_path / "out", settings)
    assert again.metrics["corrections"] == whole.metrics["corrections"]
    assert again.metrics["files"] == whole.metrics["files"]


@pytest.mark.parametrize(
    ("layout", "changed"),
    [
        ("mixtral", {}),
        ("qwen3_5_moe", {}),
        ("mixtral", {"share_families": True, "scope": "layer"}),
        ("mixtral", {"families": ("down",)}),
    ],
)
def test_left_factors_of_down_are_refitted(
    layout: str, changed: dict[str, Any], calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The last layer comes nearer, other tensors stay, and what is told of the factors is measured on them."""
    model, statistics = calibrated(layout)
    settings = {**SMALL, **FACTORED, "calibrate": str(statistics), **changed}
    compress(model, tmp_path / "plain", Settings(**settings))
    found = compress(model, tmp_path / "out", Settings(**settings, correct="down"))
    wanted, distances = _last_states(model), {}
    for name in ("plain", "out"):
        export(tmp_path / name, tmp_path / f"{name}-dense")
        distances[name] = float((_last_states(tmp_path / f"{name}-dense") - wanted).norm())
    assert distances["out"] < 0.985 * distances["plain"], distances

    source = Checkpoint(model)
    told, family = found.metrics["corrections"], source.family("down")
    assert all(line["after"] <= line["before"] for line in told)
    assert all(len(line["ridges"]) == len(family) // family.layers for line in told)
    tensors = {expert.tensor for expert in family.experts}
    assert set(json.loads((tmp_path / "out" / "globe.json").read_text())["changed"]) == tensors
    before, after = (_tensors(tmp_path / name) for name in ("plain", "out"))
    assert before.keys() == after.keys()
    lefts = {left_name(tensor, "down") for tensor in tensors}
    assert {name for name in before if not torch.equal(before[name], after[name])} <= lefts
    assert any(not torch.equal(before[name], after[name]) for name in lefts)

    stored, dense = _tensors(model), _tensors(tmp_path / "out-dense")
    lost = sum(float((dense[name].double() - stored[name].double()).square().sum()) for name in tensors)
    whole = sum(float(stored[name].double().square().sum()) for name in tensors)
    told = found.metrics["families"]["down"]["relative_error"]
    assert told == pytest.approx(lost / whole, rel=0.02)  # an export is rounded to the source's dtype


def test_left_factors_of_down_go_on_to_the_same_bytes(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind the corrections, and again between the shards."""
    model, statistics = calibrated("mixtral")
    settings = Settings(**{**SMALL, **FACTORED}, calibrate=str(statistics), correct="down")
    whole = compress(model, tmp_path / "whole", settings)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for place, name in ((pipeline, "write_weights"), (writing, "_write_bank")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(KeyboardInterrupt):
                compress(model, tmp_path / "out", settings)
    with monkeypatch.context() as patch:
        patch.setattr(correction, "Layerwise", stop)  # nothing is run again
        again = compress(model, tmp_path / "out", settings)
    for key in ("corrections", "files"):
        assert again.metrics[key] == whole.metrics[key]
    errors = [found.metrics["families"]["down"]["expert_errors"] for found in (whole, again)]
    assert errors[0] == errors[1]


def test_sizes_for_a_ratio_are_probed_without_corrections(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, statistics = calibrated("mixtral")
    measured: dict[str, Any] = {"calibrate": str(statistics), "correct": "down"}
    settings = Settings(ratio=0.8, joint_steps=1, device="cpu", **FAMILIES, **measured)
    stages = inspect(model, settings, estimated=True)["estimate"]["stages"]
    assert {"plan", "correct"} <= {stage["name"] for stage in stages}
    found = compress(model, tmp_path / "out", settings).metrics
    assert found["plan"]["units"].keys() == {"gate", "up", "down"} and found["corrections"]


def test_what_cannot_be_corrected_is_refused_beforehand(
    calibrated: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="correct is down with left factors of down in 4 bits"):
        Settings(families=("gate", "down"), left_bits=4, correct="down")
    Settings(families=("gate", "down"), atom_bits=4, correct="down")
    with pytest.raises(UsageError, match="correct is down with calibrate none"):
        Settings(calibrate="none", correct="down")
    model, statistics = calibrated("mixtral")
    found = load_calibration(statistics)
    save_calibration(tmp_path / "old", {number: found.layer(number) for number in found.layers}, found.about)
    with pytest.raises(GlobeError, match="does not hold the windows"):
        compress(model, tmp_path / "out", Settings(**SMALL, calibrate=str(tmp_path / "old"), correct="down"))
