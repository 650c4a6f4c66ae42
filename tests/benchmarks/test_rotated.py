"""benchmarks/rotated.py: other weights, the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rotated import MODEL_TYPES, main, rotate, turn
from safetensors.torch import load_file, save_file

from checkpoints import calibrate_tiny, make_tiny
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError
from globe.evaluation.models import load_model
from globe.statistics.calibration import load_calibration


def scaled(layout: str, home: Path, dtype: str) -> Path:
    """A tiny checkpoint whose norms have scales."""
    model = make_tiny(layout, home / "model", dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def tie(model: Path) -> None:
    """The same checkpoint with its embedding as the head."""
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")


def logits(model: Path) -> torch.Tensor:
    loaded, _ = load_model(model)
    with torch.no_grad():
        found: torch.Tensor = loaded(torch.arange(2 * 48).view(2, 48) % 251).logits.float()
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", MODEL_TYPES)
def test_the_function_stays(layout: str, tied: bool, tmp_path: Path) -> None:
    model = scaled(layout, tmp_path, "float32")
    if tied:
        tie(model)
    rotate(model, tmp_path / "out")
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    assert after.tensors.keys() == before.tensors.keys() | {"lm_head.weight"}
    wanted = logits(model)
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for family in ("gate", "up", "down"):  # and nothing is left of the weights
        one, other = before.family(family).read(0), after.family(family).read(0)
        assert float((one - other).norm() / one.norm()) > 0.5


def test_within_the_rounding_of_bf16(tmp_path: Path) -> None:
    model = scaled("mixtral", tmp_path, "bfloat16")
    assert CliRunner().invoke(main, [str(model), str(tmp_path / "out")], catch_exceptions=False).exit_code == 0
    wanted = logits(model)
    assert float((logits(tmp_path / "out") - wanted).norm() / wanted.norm()) < 0.02


def test_statistics_are_those_of_the_rotated(tmp_path: Path) -> None:
    model = scaled("mixtral", tmp_path, "float32")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 4}), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    for name in tensors:  # every token goes to all experts alike: they have their layer's inputs
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rotate(model, tmp_path / "out")
    before = calibrate_tiny(model, tmp_path / "before.safetensors").path
    after = calibrate_tiny(tmp_path / "out", tmp_path / "after.safetensors")
    found = load_calibration(turn(before, model, tmp_path / "out"))
    assert found.about["fingerprint"] == after.about["fingerprint"]
    for number in after.layers:
        mine, wanted = found.layer(number), after.layer(number)
        sums = "moment", "diagonal", "share", "gate_rows", "up_rows", "hidden", "hidden_moment", "residual"
        for name in (*sums, "gate_fisher", "up_fisher", "output_fisher"):
            one, other = getattr(mine, name), getattr(wanted, name)
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * float(other.abs().max()))


def test_statistics_of_experts_of_their_own_are_refused(tmp_path: Path) -> None:
    model = make_tiny("mixtral", tmp_path / "model")
    rotate(model, tmp_path / "out")
    file = calibrate_tiny(model, tmp_path / "before.safetensors").path
    with pytest.raises(GlobeError, match="experts of layer 0 have inputs of their own: calibrate OUT"):
        turn(file, model, tmp_path / "out")


def test_shards_and_index(tmp_path: Path) -> None:
    model = make_tiny("olmoe", tmp_path / "model", shards=3)
    rotate(model, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert [shard.path.name for shard in found.shards] == [shard.path.name for shard in Checkpoint(model).shards]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match=r"model type phimoe found; expected one of mixtral"):
        rotate(make_tiny("phimoe", tmp_path / "phimoe"), tmp_path / "out")
    model = make_tiny("olmoe", tmp_path / "olmoe")
    (tmp_path / "there").mkdir()
    with pytest.raises(GlobeError, match=r"there: exists"):
        rotate(model, tmp_path / "there")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.layers.0.mystery.weight": torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(GlobeError, match=r"mystery\.weight is not known to read"):
        rotate(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
