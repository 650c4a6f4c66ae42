"""Several models under one config.json, where `quantization_config` stands with the language model's `text_config`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import codes  # noqa: E402
from architectures import tiny_model  # noqa: E402
from checkpoints import byte_tokenizer, calibrate_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import edit_json, refusal  # noqa: E402
from trips import run_cli  # noqa: E402

BLOCK = (8, 8)
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
SETTINGS = Settings(rank=0.5, bank_size=2, outer_loops=1, device="cpu", **WEIGHTS_ONLY)
TOKENS = torch.arange(3, 43)[None]


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix or a stack of them, and what they decode to."""
    parts = [codes.fp8(each, BLOCK) for each in (weight if weight.ndim == 3 else weight[None])]
    stored, scales = (torch.stack(each) for each in zip(*parts, strict=True))
    wide = scales.repeat_interleave(BLOCK[0], 1).repeat_interleave(BLOCK[1], 2)
    found = stored, scales, (stored.float() * wide).bfloat16()
    return tuple(each.view(each.shape[-weight.ndim :]) for each in found)  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["experts", "attention too"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """`source` in fp8 with its quantization_config in text_config, and `plain` with the numbers that it decodes to."""
    kind: str = request.param
    root = tmp_path_factory.mktemp("several")
    tiny_model("qwen3_vl_moe").save_pretrained(root / "plain")
    byte_tokenizer().save_pretrained(root / "plain")
    which = (".experts.",) if kind == "experts" else (".experts.", "language_model.layers.1.self_attn.")
    plain = load_file(root / "plain" / "model.safetensors")
    stored = dict(plain)
    for name, weight in plain.items():
        if any(part in name for part in which) and "norm" not in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = quantised(weight)
    shutil.copytree(root / "plain", root / "source")
    for place, tensors in (("source", stored), ("plain", plain)):
        save_file(tensors, root / place / "model.safetensors", metadata={"format": "pt"})
    kept = [
        name.removesuffix(".weight")
        for name in plain
        if name.endswith(".weight") and plain[name].ndim == 2 and f"{name}_scale_inv" not in stored
    ]
    stated = {**FP8, "modules_to_not_convert": kept}
    edit_json(root / "source/config.json", lambda config: config["text_config"].update(quantization_config=stated))
    for place in ("source", "plain"):
        compress(root / place, root / f"{place}-out", SETTINGS)
        export(root / f"{place}-out", root / f"{place}-dense")
    return kind, root


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return found


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(directory)[0](input_ids=TOKENS, use_cache=False).logits
    return found


def test_it_is_read_by_inspect_and_by_the_families(places: tuple[str, Path]) -> None:
    _, root = places
    told = run_cli("inspect", root / "source")
    assert told["families"]["gate"]["dtype"] == "e4m3, blocks of 8 × 8"
    source, plain = Checkpoint(root / "source"), Checkpoint(root / "plain")
    for family in FAMILIES:
        mine, theirs = source.family(family), plain.family(family)
        assert all(torch.equal(mine.read(number), theirs.read(number)) for number in range(len(theirs)))


def test_factors_and_export_are_those_of_the_decoded_checkpoint(places: tuple[str, Path]) -> None:
    kind, root = places
    for place in ("out", "dense"):
        mine, theirs = (
            {
                name: value
                for file in (root / f"{which}-{place}").glob("*.safetensors")
                for name, value in load_file(file).items()
            }
            for which in ("source", "plain")
        )
        ours = [name for name in theirs if "globe" in name or (place == "dense" and ".experts." in name)]
        assert len(ours) > 3 and all(torch.equal(mine[name], theirs[name]) for name in ours)
        assert any("self_attn" in name and name.endswith("_scale_inv") for name in mine) == (kind != "experts")
    wanted = logits(root / "plain-dense")
    assert (logits(root / "source-dense") - wanted).abs().max() < 1e-2 * wanted.abs().max()  # bf16 of decoded attention


def test_the_config_of_the_export_says_what_is_still_in_codes(places: tuple[str, Path]) -> None:
    kind, root = places
    before, after = config_of(root / "source"), config_of(root / "source-dense")
    stated = after["text_config"].pop("quantization_config", None)
    assert "quantization_config" not in after
    before["text_config"].pop("quantization_config")
    assert before == after
    if kind == "experts":
        assert stated is None
    else:
        assert {key: stated[key] for key in FP8} == FP8


def test_calibration_is_that_of_the_decoded_checkpoint(places: tuple[str, Path], tmp_path: Path) -> None:
    _, root = places
    mine, theirs = (calibrate_tiny(root / n, tmp_path / n, tokens=128, precision="fp32") for n in ("source", "plain"))
    for layer in theirs.layers:
        for name, value in vars(theirs.layer(layer)).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(mine.layer(layer), name), value), name


def test_as_source_gives_the_config_back(places: tuple[str, Path], tmp_path: Path) -> None:
    _, root = places
    export(root / "source-out", tmp_path / "again", as_source=True)
    assert config_of(tmp_path / "again") == config_of(root / "source")
    shapes = [
        {name: (value.dtype, value.shape) for name, value in weights_of(place).items()}
        for place in (root / "source", tmp_path / "again")
    ]
    assert shapes[0] == shapes[1]


def test_with_nothing_left_in_codes_the_factored_directory_runs(places: tuple[str, Path], tmp_path: Path) -> None:
    kind, root = places
    if kind != "experts":
        assert "quant_method fp8" in refusal(1, "eval", root / "source-out", "--max-tokens", "64")
        return
    compress(root / "source", tmp_path / "out", replace(SETTINGS, families=FAMILIES))
    export(tmp_path / "out", tmp_path / "dense")
    wanted = logits(tmp_path / "dense")
    assert (logits(tmp_path / "out") - wanted).abs().max() < 3e-2 * wanted.abs().max()


def test_a_configuration_inside_one_inside_another(tmp_path: Path) -> None:
    """qwen3_omni_moe: thinker_config has text_config, and that the quantization_config."""
    tiny_model("qwen3_omni_moe").save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "source")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored = dict(plain)
    for name in [name for name in plain if ".experts." in name]:
        stored[name], stored[f"{name}_scale_inv"], plain[name] = quantised(plain[name])
    for place, tensors in (("source", stored), ("plain", plain)):
        save_file(tensors, tmp_path / place / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        tmp_path / "source/config.json",
        lambda config: config["thinker_config"]["text_config"].update(quantization_config=FP8),
    )
    assert run_cli("inspect", tmp_path / "source")["families"]["down"]["dtype"] == "e4m3, blocks of 8 × 8"
    for place in ("source", "plain"):
        compress(tmp_path / place, tmp_path / f"{place}-out", replace(SETTINGS, families=FAMILIES))
        export(tmp_path / f"{place}-out", tmp_path / f"{place}-dense")
    mine, theirs = (weights_of(tmp_path / f"{place}-dense") for place in ("source", "plain"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert config_of(tmp_path / "source-dense") == config_of(tmp_path / "plain-dense")
    wanted = logits(tmp_path / "source-dense")
    assert (logits(tmp_path / "source-out") - wanted).abs().max() < 3e-2 * wanted.abs().max()
    export(tmp_path / "source-out", tmp_path / "again", as_source=True)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "source")
    assert weights_of(tmp_path / "again").keys() == stored.keys()
