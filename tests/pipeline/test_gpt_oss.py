"""gpt-oss as it is published: mxfp4 stacks of rows of gate and up in turns, biases, and a gating of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import architectures  # noqa: E402
from checkpoints import byte_tokenizer, calibrate_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.tensorfile import TensorWriter  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import edit_json  # noqa: E402

FAMILIES = ("gate", "up", "down")
SMALL: dict[str, Any] = {"rank": 4, "bank_size": 2, "device": "cpu"}
TOKENS = torch.arange(24)[None] * 7 % 256


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` with experts in mxfp4, `plain` with the numbers that they decode to, as transformers has them."""
    root = tmp_path_factory.mktemp("gpt-oss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures._SPECIAL, "gpt_oss", {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16})
        architectures.tiny_model("gpt_oss").save_pretrained(root / "plain")
    byte_tokenizer().save_pretrained(root / "plain")
    shutil.copytree(root / "plain", root / "source")
    plain = load_file(root / "plain" / "model.safetensors")
    stored = dict(plain)
    random = torch.Generator().manual_seed(1)
    pairs = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = plain[name].shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(118, 123, (count, outputs, inputs // 32), generator=random, dtype=torch.uint8)
        values = pairs[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
        decoded = (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)
        plain[name] = decoded.mT.bfloat16().contiguous()
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for name in plain:
        if name.endswith("_bias"):  # zero as transformers begins
            stored[name] = plain[name] = torch.randn(plain[name].shape, generator=random).bfloat16() / 4
    for place, tensors in (("source", stored), ("plain", plain)):
        save_file(tensors, root / place / "model.safetensors", metadata={"format": "pt"})
    edit_json(root / "source" / "config.json", lambda c: c.update(quantization_config={"quant_method": "mxfp4"}))
    return root


def logits(directory: Path) -> torch.Tensor:
    model, _ = load_model(directory)
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


def test_gate_and_up_take_turns(places: Path) -> None:
    tensors = load_file(places / "plain" / "model.safetensors")
    for place in ("source", "plain"):
        checkpoint = Checkpoint(places / place)
        for number, name in enumerate(FAMILIES):
            family = checkpoint.family(name)
            assert (family.p, family.d, len(family)) == (32, 64, 12)
            for i, expert in enumerate(family.experts):
                stack = tensors[
                    f"model.layers.{expert.layer}.mlp.experts.{'down' if name == 'down' else 'gate_up'}_proj"
                ]
                whole = stack[expert.expert] if name == "down" else stack[expert.expert].mT[number::2]
                assert torch.equal(family.read(i), whole)
                assert torch.equal(family.read(i, (5, 18)), whole[5:18])


def test_calibration_is_that_of_the_decoded_numbers(places: Path, tmp_path: Path) -> None:
    found = [calibrate_tiny(places / place, tmp_path / place, tokens=256) for place in ("source", "plain")]
    for layer in found[0].layers:
        for name, value in vars(found[0].layer(layer)).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(found[1].layer(layer), name)), (layer, name)


@pytest.mark.parametrize("families", [("gate", "up"), FAMILIES, ("up",), ("down",)], ids="+".join)
def test_factored_exported_and_run(places: Path, tmp_path: Path, families: tuple[str, ...]) -> None:
    settings = Settings(**SMALL, outer_loops=0, families=families, **WEIGHTS_ONLY)
    for place in ("source", "plain"):
        compress(places / place, tmp_path / place, settings)
        export(tmp_path / place, tmp_path / f"{place}-dense")
    mine, theirs = (load_file(tmp_path / f"{place}-dense" / "model.safetensors") for place in ("source", "plain"))
    before = load_file(places / "plain" / "model.safetensors")
    assert mine.keys() == theirs.keys() == before.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) and value.shape == before[name].shape, name
    wanted = logits(tmp_path / "source-dense")
    factored = ["plain", "source"] if families == FAMILIES else ["plain"]  # what stays in codes does not run
    for place in factored:
        assert torch.allclose(logits(tmp_path / place), wanted, atol=3e-2 * float(wanted.abs().max()))


def test_an_export_makes_an_expert_of_a_stack_at_a_time(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(places / "source", tmp_path / "out", Settings(**SMALL, outer_loops=0, **WEIGHTS_ONLY))
    written, write = {}, TensorWriter.write_parts

    def counted(writer: TensorWriter, name: str, parts: Iterable[torch.Tensor]) -> None:
        held = list(parts)
        written[name] = [part.nbytes for part in held]
        write(writer, name, held)

    monkeypatch.setattr(TensorWriter, "write_parts", counted)
    export(tmp_path / "out", tmp_path / "dense")
    stacks = [name for name in written if name.endswith("experts.gate_up_proj")]
    assert len(stacks) == 3 and all(written[name] == [2 * 64 * 64] * 4 for name in stacks)
    decoded = [name for name in written if name.endswith("experts.down_proj")]
    assert len(decoded) == 3 and all(written[name] == [2 * 64 * 32] * 4 for name in decoded)


@pytest.mark.parametrize("families", [("gate", "up"), FAMILIES], ids="+".join)
def test_down_is_corrected_where_it_lies_transposed(places: Path, tmp_path: Path, families: tuple[str, ...]) -> None:
    calibrate_tiny(places / "plain", tmp_path / "plain.safetensors", tokens=512)
    calibrate_tiny(places / "source", tmp_path / "source.safetensors", tokens=512)
    for place in ("source", "plain"):
        statistics = str(tmp_path / f"{place}.safetensors")
        settings = Settings(
            **SMALL, solver="alternate", outer_loops=0, families=families, correct="down", calibrate=statistics
        )
        compress(places / place, tmp_path / place, settings)
        export(tmp_path / place, tmp_path / f"{place}-dense")
    mine, theirs = (load_file(tmp_path / f"{place}-dense" / "model.safetensors") for place in ("source", "plain"))
    before = load_file(places / "plain" / "model.safetensors")
    changed = 0
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) and value.shape == before[name].shape, name
        changed += name.endswith("down_proj") and not torch.equal(value, before[name])
    assert changed == 3
