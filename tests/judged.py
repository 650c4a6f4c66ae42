"""What becomes of a tiny model of an architecture: read, exported, run factored, calibrated, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import globe.hf  # noqa: F401
from architectures import tiny_model
from checkpoints import byte_tokenizer
from families import WEIGHTS_ONLY
from globe import Settings, calibrate, compress, export
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError

STEPS = ("reads", "exports", "runs factored", "calibrates")
_TEXT = "What an expert is given is what the router sends it. " * 40


@dataclass(frozen=True)
class Judged:
    """How far an architecture comes: its layout, the `STEPS` that work, and for the first that does not, why."""

    model_type: str
    layout: str
    works: tuple[str, ...]
    why: str


def judge(model_type: str, folder: Path) -> Judged:
    """Take a tiny model of a type through the steps, in a folder.

    A step works if nothing is refused and its result is right: all tensors but those of gate and up are the source's to
    the bit in the export, transformers misses none of them and knows each, and the factored directory gives the
    export's logits in float32, but for the rounding of the export. Whatever is wrong otherwise raises AssertionError.
    """
    layout, works = "", []
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Judged(model_type, layout, (), f"transformers builds no small one: {_line(error)}")
    if model is None:
        return Judged(model_type, layout, (), "transformers has no class that generates text")
    source, out, dense = (folder / name for name in ("source", "out", "dense"))
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    try:
        layout = Checkpoint(source).layout.name
        compress(source, out, Settings(rank=0.5, bank_ratio=0.5, outer_loops=0, device="cpu", **WEIGHTS_ONLY))
        works.append("reads")
        export(out, dense)
        require_untouched(source, dense)
        wanted = _logits(type(model), dense, ids)
        works.append("exports")
        found = _logits(type(model), out, ids)
        # The export is rounded to bf16; a norm behind the experts (muse_spark) makes much of that.
        # One token in a hundred (of diffusion there are hundreds) may be sent to another expert by that rounding.
        off = (found - wanted).abs().amax(-1) >= 3e-2 * float(wanted.abs().max())
        assert float(off.float().mean()) <= 0.01
        works.append("runs factored")
    except (GlobeError, AttributeError) as error:
        return Judged(model_type, layout, tuple(works), _line(error, source))
    try:
        calibrate(source, folder / "statistics.safetensors", text=_TEXT, tokens=256, window=64)
    except GlobeError as error:
        return Judged(model_type, layout, tuple(works), _line(error, source))
    return Judged(model_type, layout, (*works, "calibrates"), "")


def _logits(kind: Any, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.manual_seed(0)  # a model of diffusion draws what it begins with
    with torch.no_grad():
        speaks = getattr(model, "thinker", model)  # of qwen3_omni_moe, which has no forward of its own
        logits: torch.Tensor = speaks.eval()(input_ids=ids, use_cache=False).logits
    assert logits.isfinite().all()
    return logits


def require_untouched(source: Path, dense: Path) -> None:
    """All tensors but the experts' gate and up are the source's, to the bit."""
    families = Checkpoint(source).chosen(("gate", "up")).values()
    touched = {expert.tensor for family in families for expert in family.experts}
    before, after = (_tensors(directory) for directory in (source, dense))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name not in touched:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).flatten() for name in file.keys()}
    return found


def _line(error: Exception, source: Path | None = None) -> str:
    told = f"{type(error).__name__}: {error}".partition("\n")[0].removeprefix("GlobeError: ")
    return told.replace(f"{source}: ", "")[:200]
