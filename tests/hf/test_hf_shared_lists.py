"""Experts that transformers takes out of one list with others, or ties to others, run factored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architectures import tiny_config, tiny_model  # noqa: E402
from checkpoints import byte_tokenizer  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.hf import FactoredExperts  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY)
TOKENS = torch.arange(3, 35)[None]
WIDTH = 64  # of experts, whose left factors then have whole groups of 32 at rank 32
TYPES = ("ernie4_5_vl_moe", "diffusion_gemma")


def made(model_type: str, root: Path, **changes: Any) -> type[Any]:
    """Compress and export a tiny model; its class."""
    config = tiny_config(model_type)
    widths = config.text_config.moe_intermediate_size
    config.text_config.moe_intermediate_size = [WIDTH, WIDTH] if isinstance(widths, list) else WIDTH
    torch.manual_seed(0)
    model = type(tiny_model(model_type))(config).bfloat16()
    model.save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    compress(root / "source", root / "out", replace(SETTINGS, **changes))
    export(root / "out", root / "dense")
    return type(model)


def loaded(kind: Any, directory: Path) -> Any:
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("changes", [{}, {"families": ("gate", "up", "down")}, {"left_bits": 8, "rank": 32}])
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_the_export(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    kind = made(model_type, tmp_path, **changes)
    found, wanted = (loaded(kind, tmp_path / name) for name in ("out", "dense"))
    assert sum(isinstance(module, FactoredExperts) for module in found.modules()) >= 2
    off = (logits(found) - logits(wanted)).abs().amax(-1) >= 3e-2 * float(logits(wanted).abs().max())
    assert float(off.float().mean()) <= 0.03  # tokens of diffusion that rounding sends to another expert


def test_experts_for_images_are_as_they_were(tmp_path: Path) -> None:
    kind = made("ernie4_5_vl_moe", tmp_path)
    found, wanted = (loaded(kind, tmp_path / name) for name in ("out", "source"))
    for number in (1, 2):
        mine, theirs = (model.model.language_model.layers[number].mlp for model in (found, wanted))
        assert isinstance(mine.text_moe.experts, FactoredExperts)
        assert torch.equal(mine.text_moe.experts.down_proj, theirs.text_moe.experts.down_proj)
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(mine.vision_moe.experts, name), getattr(theirs.vision_moe.experts, name))


def test_one_half_of_a_shared_list_is_refused_in_a_line(tmp_path: Path) -> None:
    kind = made("ernie4_5_vl_moe", tmp_path, families=("gate",))
    with pytest.raises(GlobeError, match=r"one of the two is factored here: compress both \(--families gate,up\)"):
        loaded(kind, tmp_path / "out")


def test_tied_experts_are_one_in_memory_and_are_saved_once(tmp_path: Path) -> None:
    kind = made("diffusion_gemma", tmp_path)
    found = loaded(kind, tmp_path / "out")
    one, other = (part.layers[1].experts for part in (found.model.decoder, found.model.encoder.language_model))
    assert one is not other and all(other._parameters[name] is value for name, value in one._parameters.items())
    assert {"gate_left", "up_left", "down_proj"} == one._parameters.keys()
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(kind, tmp_path / "again")), logits(found))
