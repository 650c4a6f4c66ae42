"""Checkpoints whose experts are stored as codes: compressed as their decoded numbers, exported, loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.torch import load_file, save_file  # noqa: E402

import codes  # noqa: E402
from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export, inspect  # noqa: E402
from globe.artifact.factored import open_factored  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import SMALL, edit_json, edit_tensor, json_variants, refusal  # noqa: E402

BLOCK = (16, 16)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
KINDS = {
    "deepseek_v3": ("deepseek_v3", FP8, (".experts.", ".shared_experts.", ".o_proj.")),
    "qwen3_moe": ("qwen3_moe", codes.config("pack-quantized", INT4), (".experts.", "self_attn.")),
    "experts alone": ("qwen3_moe", codes.config("pack-quantized", INT4), (".experts.",)),
}


def quantise(weight: torch.Tensor, name: str, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix as stored, and what that decodes to."""
    if KINDS[kind][1] is FP8:
        stored, scales = codes.fp8(weight, BLOCK)
        wide = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        return {name: stored, f"{name}_scale_inv": scales}, (stored.float() * wide).bfloat16()
    parts, decoded = codes.compressed(weight, "pack-quantized", INT4)
    return {name.removesuffix("weight") + part: value for part, value in parts.items()}, decoded


def write(directory: Path, tensors: dict[str, torch.Tensor], apart: bool) -> None:
    """One file; or two, with scales of the first half of the experts' names beside the codes of the second half."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if not apart:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    second = set(names[len(names) // 2 :]) | {name for name in names if name.endswith(("_scale", "_shape"))}
    files = {name: f"model-0000{2 if name in second else 1}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        held = {name: value for name, value in tensors.items() if files[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module", params=KINDS)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """`source` stored as codes and `plain` with the numbers that they decode to; what was made of both."""
    kind: str = request.param
    architecture, quantization, which = KINDS[kind]
    root = tmp_path_factory.mktemp("encoded")
    make_tiny(architecture, root / "plain")
    tensors = {name: value.bfloat16() for name, value in load_file(root / "plain" / "model.safetensors").items()}
    stored, plain = {}, dict(tensors)
    for name, weight in tensors.items():
        if any(part in name for part in which) and name.endswith("proj.weight"):
            parts, plain[name] = quantise(weight, name, kind)
            stored |= parts
        else:
            stored[name] = weight
    shutil.copytree(root / "plain", root / "source")
    for place, content in (("source", stored), ("plain", plain)):
        write(root / place, content, apart=kind == "qwen3_moe")
        edit_json(root / place / "config.json", lambda config: config.update(dtype="bfloat16", torch_dtype="bfloat16"))
    left_out = sorted(
        {name.removesuffix(".weight") for name in stored if name.endswith("proj.weight")}
        - {name.removesuffix(".weight") for name in tensors if any(part in name for part in which)}
    )
    key = "modules_to_not_convert" if quantization is FP8 else "ignore"
    quantization = {**quantization, key: [*left_out, "lm_head"]}
    edit_json(root / "source" / "config.json", lambda config: config.update(quantization_config=quantization))
    for place in ("source", "plain"):
        settings = Settings(rank=0.25, bank_size=2, outer_loops=1, device="cpu", **WEIGHTS_ONLY)
        compress(root / place, root / f"{place}-out", settings)
        export(root / f"{place}-out", root / f"{place}-dense")
    return kind, root


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def test_the_experts_are_their_decoded_numbers(places: tuple[str, Path]) -> None:
    _, root = places
    source, plain = Checkpoint(root / "source"), Checkpoint(root / "plain")
    for family in FAMILIES:
        mine, theirs = source.family(family), plain.family(family)
        assert (mine.dtype, len(mine)) == (torch.bfloat16, len(theirs))
        for number in range(len(mine)):
            assert torch.equal(mine.read(number), theirs.read(number))
            assert torch.equal(mine.read(number, (3, 21)), theirs.read(number, (3, 21)))


def test_the_factors_are_those_of_the_decoded_checkpoint(places: tuple[str, Path]) -> None:
    _, root = places
    mine, theirs = weights_of(root / "source-out"), weights_of(root / "plain-out")
    ours = [name for name in theirs if "globe" in name]
    assert len(ours) > 20 and all(torch.equal(mine[name], theirs[name]) for name in ours)
    source = weights_of(root / "source")
    factored = [name for name in source if ".experts." in name and "down" not in name]
    assert set(mine) == set(source) - set(factored) | set(ours)
    for name in set(source) - set(factored):
        assert torch.equal(bits(mine[name]), bits(source[name])), name
    assert any("down_proj.weight_" in name for name in mine)


def test_calibration_is_that_of_the_decoded_checkpoint(places: tuple[str, Path], tmp_path: Path) -> None:
    _, root = places
    for place in ("source", "plain"):
        found = calibrate_tiny(root / place, tmp_path / f"{place}.safetensors", tokens=256)
        if place == "source":
            mine = found
    assert mine.layers == found.layers
    for layer in mine.layers:
        for name, value in vars(mine.layer(layer)).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(found.layer(layer), name)), (layer, name)


def test_the_export_loads_and_computes_as_that_of_the_decoded_checkpoint(places: tuple[str, Path]) -> None:
    kind, root = places
    mine, theirs, source = (weights_of(root / place) for place in ("source-dense", "plain-dense", "source"))
    experts = [name for name in theirs if ".experts." in name]
    assert set(experts) == {name for name in mine if ".experts." in name}
    assert all(torch.equal(bits(mine[name]), bits(theirs[name])) for name in experts)
    others = [name for name in source if ".experts." not in name]
    assert set(others) | set(experts) == set(mine)
    assert all(torch.equal(bits(mine[name]), bits(source[name])) for name in others)
    config = json.loads((root / "source-dense" / "config.json").read_text())
    assert ("quantization_config" in config) == (kind != "experts alone")
    tokens = torch.arange(24)[None] * 7 % 256
    found = {}
    for place in ("source-dense", "plain-dense"):
        model, _ = load_model(root / place)
        with torch.no_grad():
            found[place] = model(tokens).logits.float()
    assert torch.allclose(found["source-dense"], found["plain-dense"], atol=2e-2)
    assert not torch.allclose(found["plain-dense"], found["plain-dense"].roll(1, 1), atol=2e-2)


def test_bytes_and_ratios_are_those_of_the_codes(places: tuple[str, Path]) -> None:
    kind, root = places
    told: dict[str, Any] = inspect(root / "source")
    source = weights_of(root / "source")
    gates = sum(value.nbytes for name, value in source.items() if ".experts." in name and "gate_proj" in name)
    assert told["families"]["gate"]["bytes"] == gates
    assert told["families"]["gate"]["dtype"] == ("e4m3, blocks of 16 × 16" if "deep" in kind else "int4, groups of 32")
    everything = sum(value.nbytes for value in source.values())
    assert told["bytes"]["checkpoint"] == everything
    experts = sum(value.nbytes for name, value in source.items() if ".experts." in name)
    assert told["bytes"]["experts"] == experts
    metrics = json.loads((root / "source-out" / "metrics.json").read_text())
    made = weights_of(root / "source-out")
    stored = sum(value.nbytes for name, value in made.items() if "globe" in name)
    touched = metrics["bytes"]["touched"]
    assert metrics["ratio"]["touched"] == pytest.approx(stored / touched, rel=0.02)
    assert metrics["ratio"]["experts"] == pytest.approx((experts - touched + stored) / experts, rel=0.02)
    assert metrics["ratio"]["checkpoint"] == pytest.approx((everything - touched + stored) / everything, rel=0.02)
    planned = inspect(root / "source", Settings(ratio=0.5))["choices"]
    assert planned and all(choice["ratio"]["touched"] <= 0.5 for choice in planned)


def test_as_source_writes_fp8_again(places: tuple[str, Path], tmp_path: Path) -> None:
    kind, root = places
    if kind != "deepseek_v3":
        line = refusal(2, "export", root / "source-out", tmp_path / "dense", "--as-source")
        assert "int4, groups of 32" in line and "--as-source" in line
        line = refusal(2, "export", root / "plain-out", tmp_path / "dense", "--as-source")
        assert "stores compressed experts as values" in line
        return
    told = export(root / "source-out", tmp_path / "again", as_source=True)
    source, again, dense = (weights_of(place) for place in (root / "source", tmp_path / "again", root / "source-dense"))
    assert told["bytes"] == sum(value.nbytes for value in source.values())
    assert {name: (value.dtype, value.shape) for name, value in again.items()} == {
        name: (value.dtype, value.shape) for name, value in source.items()
    }
    anew = [name for name in source if ".experts." in name and "down" not in name]
    for name in set(source) - set(anew):
        assert torch.equal(bits(again[name]), bits(source[name])), name
    configs = [json.loads((place / "config.json").read_text()) for place in (root / "source", tmp_path / "again")]
    assert configs[0] == configs[1]
    matrices = Checkpoint(tmp_path / "again").family("gate")
    for number, expert in enumerate(matrices.experts):
        wanted, found = dense[expert.tensor].float(), matrices.read(number).float()
        peaks = wanted.view(2, 16, 4, 16).abs().amax((1, 3), keepdim=True)
        off = (found - wanted).view(2, 16, 4, 16).abs()
        assert bool((off <= 2**-4 * wanted.view_as(off).abs() + 2**-9 * peaks).all()) and off.any()
    model, _ = load_model(tmp_path / "again")
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_a_hostile_scale_ends_the_command_in_one_line(places: tuple[str, Path], tmp_path: Path) -> None:
    kind, root = places
    source = Path(shutil.copytree(root / "source", tmp_path / "source"))
    name = "model.layers.2.mlp.experts.3.up_proj.weight_scale" + ("_inv" if "deep" in kind else "")
    edit_tensor(source, name, lambda scale: scale.index_fill(0, torch.tensor([1]), float("nan")))
    line = refusal(1, "compress", source, tmp_path / "out", *SMALL, "--rank", "0.1")
    assert f"tensor {name} holds nan in row 1, column 0" in line and "expected scales above 0" in line


def test_codes_and_values_of_one_expert_at_once_are_refused(places: tuple[str, Path], tmp_path: Path) -> None:
    kind, root = places
    if kind != "experts alone":
        pytest.skip("codes of fp8 have the name of the values, and one such checkpoint is enough")
    source = Path(shutil.copytree(root / "source", tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    save_file({**tensors, name: torch.zeros(32, 64)}, source / "model.safetensors", metadata={"format": "pt"})
    line = refusal(1, "inspect", source)
    assert "expert 1 of layer 0 is in" in line and f"{name}_packed" in line


def test_damaged_records_of_codes_are_named_or_do_not_matter(places: tuple[str, Path], tmp_path: Path) -> None:
    _, root = places
    out = Path(shutil.copytree(root / "source-out", tmp_path / "out"))
    record = json.loads((out / "globe.json").read_text())
    refused = 0
    for key in ("encoded", "origin"):
        entry = next(e for shard in record["source"]["shards"] for e in shard["tensors"].values() if key in e)
        whole = entry[key]
        for what, damaged in json_variants(whole, (None, -1, "weight", [], {}), most=3):
            entry[key] = damaged
            (out / "globe.json").write_text(json.dumps(record))
            try:
                open_factored(out)
            except GlobeError as error:
                refused += 1
                assert "\n" not in str(error), what
        entry[key] = whole
    assert refused > 50


def test_with_all_families_factored_the_output_runs_itself(places: tuple[str, Path], tmp_path: Path) -> None:
    kind, root = places
    if kind != "experts alone":
        line = refusal(1, "eval", root / "source-out", "--max-tokens", "64")
        assert "globe export" in line
        return
    settings = Settings(
        rank=0.25, bank_size=2, outer_loops=0, device="cpu", families=("gate", "up", "down"), **WEIGHTS_ONLY
    )
    compress(root / "source", tmp_path / "out", settings)
    export(tmp_path / "out", tmp_path / "dense")
    assert not any("weight_" in name for name in weights_of(tmp_path / "out"))
    tokens, found = torch.arange(24)[None] * 7 % 256, []
    for place in ("out", "dense"):
        model, _ = load_model(tmp_path / place)
        with torch.no_grad():
            found.append(model(tokens).logits.float())
    assert torch.allclose(*found, atol=2e-2)


def test_a_stack_of_experts_in_fp8_of_which_a_half_is_factored(tmp_path: Path) -> None:
    tensors = load_file(make_tiny("qwen3_5_moe", tmp_path / "plain") / "model.safetensors")
    stored, plain = {}, {}
    for name, value in tensors.items():
        stored[name] = plain[name] = value
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made = [quantise(expert, name, "deepseek_v3") for expert in value]
            stored |= {part: torch.stack([parts[part] for parts, _ in made]) for part in made[0][0]}
            plain[name] = torch.stack([decoded for _, decoded in made])
    shutil.copytree(tmp_path / "plain", tmp_path / "source")
    write(tmp_path / "source", stored, apart=False)
    write(tmp_path / "plain", plain, apart=False)
    edit_json(tmp_path / "source" / "config.json", lambda config: config.update(quantization_config=FP8))
    for place in ("source", "plain"):
        settings = Settings(rank=0.25, bank_size=2, outer_loops=0, device="cpu", families=("gate",), **WEIGHTS_ONLY)
        compress(tmp_path / place, tmp_path / f"{place}-out", settings)
        export(tmp_path / f"{place}-out", tmp_path / f"{place}-dense")
    mine, theirs = weights_of(tmp_path / "source-dense"), weights_of(tmp_path / "plain-dense")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "quantization_config" not in json.loads((tmp_path / "source-dense" / "config.json").read_text())
    export(tmp_path / "source-out", tmp_path / "again", as_source=True)
    again, source = weights_of(tmp_path / "again"), weights_of(tmp_path / "source")
    shapes = [{name: (value.dtype, value.shape) for name, value in each.items()} for each in (again, source)]
    assert shapes[0] == shapes[1]
    for name in source:
        assert torch.equal(bits(again[name]), bits(source[name])) == ("gate_up_proj" not in name), name
    decoded, wanted = Checkpoint(tmp_path / "again").family("up"), Checkpoint(tmp_path / "source").family("up")
    for number in range(len(decoded)):
        assert torch.allclose(decoded.read(number).float(), wanted.read(number).float(), rtol=2**-3, atol=1e-3)
