"""Factored directories whose language model is one of several under one config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import globe.hf  # noqa: E402, F401
from architectures import tiny_config, tiny_model  # noqa: E402
from checkpoints import byte_tokenizer  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export, load  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from judged import require_untouched  # noqa: E402
from refusals import in_process  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_ratio=0.5, outer_loops=0, device="cpu", **WEIGHTS_ONLY)
TOKENS = torch.arange(3, 43)[None]


def made(model: Any, root: Path) -> tuple[Path, Path]:
    """Its factored directory and the export of that."""
    model.save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    compress(root / "source", root / "out", SETTINGS)
    export(root / "out", root / "dense")
    return root / "out", root / "dense"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = getattr(model, "thinker", model)(input_ids=TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_omni_moe"])
def test_load_takes_the_class_that_gives_text(model_type: str, tmp_path: Path) -> None:
    out, dense = made(tiny_model(model_type), tmp_path)
    wanted = logits(load_model(dense)[0])
    by_name = load(out, dtype=torch.float32)
    by_code = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    for model in (by_name, by_code, load_model(out)[0]):
        assert (logits(model) - wanted).abs().max() < 3e-2 * wanted.abs().max()
        assert model.globe_stats()["hits"] + model.globe_stats()["misses"] > 0


def test_a_model_that_speaks_beside_the_one_that_thinks(tmp_path: Path) -> None:
    """It has layers and experts of the same numbers, which stay as they are; beside factored ones they do not load."""
    values = tiny_config("qwen3_omni_moe").to_dict()
    values["enable_audio_output"] = True
    values["talker_config"] |= {"spatial_merge_size": 2}
    values["talker_config"]["text_config"] |= {"shared_expert_intermediate_size": 24}
    config = transformers.AutoConfig.for_model("qwen3_omni_moe").from_dict(values)
    torch.manual_seed(0)
    out, dense = made(transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16), tmp_path)
    require_untouched(tmp_path / "source", dense)
    found = transformers.AutoModelForMultimodalLM.from_pretrained(dense, output_loading_info=True)[1]
    assert not found["missing_keys"] and not found["unexpected_keys"]
    for run in (load, load_model):
        with pytest.raises(GlobeError, match=r"experts of its own in talker\.model\.layers\.0.*globe export"):
            run(out)


def test_a_model_inside_another_is_evaluated_and_healed(tmp_path: Path) -> None:
    out, _ = made(tiny_model("qwen3_omni_moe"), tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Experts that share atoms are told apart by their left factors. " * 64)
    options = ("--text", text, "--own-tokens", "0", "--text-tokens", "1024", "--window", "64", "--steps", "1", "-q")
    for command in (
        ("eval", out, "--against", tmp_path / "source", "--max-tokens", "64", "-q"),
        ("calibrate", tmp_path / "source", tmp_path / "statistics", "--text", text, "--tokens", "1024", "-q"),
        ("heal", out, "--against", tmp_path / "source", *options),
    ):
        done = in_process(*command)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
