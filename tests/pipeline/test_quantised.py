"""bf16 experts beside attention that is stored as fp8, and a quantization_config that nothing needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import refusal  # noqa: E402

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
FP8["modules_to_not_convert"] = [*(f"model.layers.{n}.mlp" for n in range(3)), "lm_head"]
SAID = "non-expert tensors are F8_E4M3, quant_method fp8"


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def state(directory: Path, **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps({**read_config(directory), **changes}))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8`; `plain`, the same numbers dequantised; `out` and `dense`, made of `fp8`."""
    root = tmp_path_factory.mktemp("quantised")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    tensors = load_file(make_tiny("qwen3_moe", root / "fp8") / "model.safetensors")
    make_tiny("qwen3_moe", root / "plain")
    for name, weight in tensors.items():
        stored[name] = plain[name] = weight
        if "self_attn" in name and name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[name + "_scale_inv"] = codes.view(rows, columns), scale
            plain[name] = (codes.float() * scale[:, None, :, None]).view(rows, columns)
    for place, content in (("fp8", stored), ("plain", plain)):
        save_file(content, root / place / "model.safetensors", metadata={"format": "pt"})
    state(root / "fp8", quantization_config=FP8)
    small = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY)
    compress(root / "fp8", root / "out", small)
    export(root / "out", root / "dense")
    return root


def logits(directory: Path) -> torch.Tensor:
    model, _ = load_model(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        return model(torch.arange(24)[None] * 7 % 256).logits


def test_a_partly_quantised_source_runs_as_its_dequantised_numbers(places: Path) -> None:
    assert torch.allclose(logits(places / "fp8"), logits(places / "plain"), atol=1e-5)


def test_the_export_says_what_is_quantised_and_equals_the_source_but_for_the_experts(places: Path) -> None:
    assert read_config(places / "dense")["quantization_config"] == FP8
    source, dense = (load_file(places / place / "model.safetensors") for place in ("fp8", "dense"))
    assert source.keys() == dense.keys()
    others = [name for name in source if ".experts." not in name]
    assert any(source[name].dtype == torch.float8_e4m3fn for name in others)
    for name in others:
        assert torch.equal(source[name].view(torch.uint8), dense[name].view(torch.uint8)), name
    plain = load_file(places / "plain" / "model.safetensors")
    expected = places / "expected"
    make_tiny("qwen3_moe", expected)
    mixed = {name: dense[name] if ".experts." in name else weight for name, weight in plain.items()}
    save_file(mixed, expected / "model.safetensors", metadata={"format": "pt"})
    assert torch.allclose(logits(places / "dense"), logits(expected), atol=1e-5)


def test_calibration_decodes_attention_too(places: Path, tmp_path: Path) -> None:
    found = [calibrate_tiny(places / place, tmp_path / f"{place}.safetensors") for place in ("fp8", "plain")]
    for layer in found[0].layers:
        mine, theirs = (each.layer(layer) for each in found)
        # `plain` has the products in fp32, of which decoding keeps bf16: a token or two are routed otherwise.
        assert int((mine.counts - theirs.counts).abs().sum()) <= 8
        assert torch.linalg.norm(mine.moment - theirs.moment) < 2e-2 * torch.linalg.norm(theirs.moment)


def test_loading_out_is_refused_in_one_line(places: Path, tmp_path: Path) -> None:
    line = refusal(1, "eval", places / "out", "--max-tokens", "64")
    assert SAID in line and "globe export" in line


def test_a_quantization_config_that_no_tensor_needs_is_dropped(places: Path, tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    before = logits(source)
    state(source, quantization_config=FP8)
    assert torch.equal(logits(source), before)
    compress(source, tmp_path / "out", Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY))
    export(tmp_path / "out", tmp_path / "dense")
    assert "quantization_config" not in read_config(tmp_path / "dense")
    assert torch.allclose(logits(tmp_path / "out"), logits(tmp_path / "dense"), atol=1e-2)


def test_quantised_tensors_that_config_does_not_explain_are_not_run(places: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(places / "fp8", tmp_path / "source"))
    config = read_config(source)
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(GlobeError, match=r"F8_E4M3, config.json has no quantization_config that says how"):
        load_model(source)
