"""What a directory is that holds no checkpoint as GloBE reads them, and the step that would make one of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from globe.checkpoint.layouts import Layout, read_layouts
from globe.checkpoint.quantised import made_of
from globe.errors import GlobeError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPERT_LIKE = re.compile(r"\.(?:experts|switch_mlp)\.")
_ONE_EXPERT = re.compile(r"\.experts\.[0-9]+\.")
# Of names of experts, the form that they show.
_FORMS = (
    (re.compile(r"\.experts\..*\.(?:qweight|qzeros|scales|g_idx)$"), "quantised as by GPTQ or AWQ"),
    (re.compile(r"\.switch_mlp\."), "as MLX stores them"),
)
_LOAD = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
_MERGE = "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained"


def missing_directory(directory: Path) -> GlobeError:
    """What to say of a checkpoint directory that is none."""
    text = str(directory)
    if directory.is_symlink() and not directory.exists():
        return GlobeError(f"{text}: a link to nothing; expected a checkpoint directory with config.json")
    if directory.suffix == ".gguf":
        return GlobeError(f"{text}: GGUF is not read; start from the safetensors checkpoint that it was made of")
    if directory.exists():
        return GlobeError(f"{text}: no such directory but a file; expected a checkpoint directory with config.json")
    remedy = "expected a checkpoint directory with config.json"
    if _HUB_NAME.fullmatch(text):
        name = directory.name
        remedy = f"if it is a name on the hub, fetch it with `hf download {text} --local-dir {name}` and give {name}"
    return GlobeError(f"{text}: no such directory; {remedy}")


def missing_weights(directory: Path) -> GlobeError | None:
    """What to say of a directory without the weight files that transformers looks for; None if it shows nothing."""
    names = sorted(entry.name for entry in directory.iterdir())
    suffixes = {Path(name).suffix for name in names}
    where, merged = str(directory), f"{directory}-merged"
    if "adapter_config.json" in names:
        command = f'python -c "{_MERGE}({where!r}).merge_and_unload().save_pretrained({merged!r})"'
        return GlobeError(f"{where}: an adapter, not a model; merge it into its model with `{command}` and give that")
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards and "config.json" in names:
        index = "model.safetensors.index.json"
        return GlobeError(f"{where}: shards such as {shards[0]} but no {index}, which names their tensors; fetch it")
    if suffixes & {".bin", ".pt", ".pth"}:
        saved = f"{directory}-safetensors"
        command = f"python -c \"{_LOAD}({where!r}, dtype='auto').save_pretrained({saved!r})\""
        first = next(name for name in names if Path(name).suffix in {".bin", ".pt", ".pth"})
        return GlobeError(
            f"{where}: weights in {first}, not in safetensors; convert them with `{command}`, copy the tokenizer's "
            f"files and give {saved}"
        )
    if ".gguf" in suffixes:
        return GlobeError(f"{where}: GGUF is not read; start from the safetensors checkpoint that it was made of")
    return None


def unknown_layout(directory: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> GlobeError:
    """What to say of tensors that no layout of the model's type names."""
    model_type, names = config.get("model_type"), list(tensors)
    mine = [layout for layout in read_layouts() if layout.is_of(model_type)]
    named = [name for name in names if any(_known(layout, name) for layout in read_layouts())]
    if not mine:
        known = sorted({name for layout in read_layouts() for name in layout.model_types})
        shown = next((name for name in names if _EXPERT_LIKE.search(name)), None)
        what = "has no tensors of routed experts that are known"
        if named:
            what = f"has tensors of routed experts ({named[0]})"
        elif shown is not None:
            form = _form(shown)
            what += f" ({form + made_of(config) if form else shown})"
        return GlobeError(
            f"{directory}: unknown architecture: the checkpoint {what}, and config.json says model_type "
            f"{model_type!r}; supported are {', '.join(known)}"
        )
    return GlobeError(f"{directory}: {_other_names(names, mine)}{made_of(config) if any(map(_form, names)) else ''}")


def other_names(names: Iterable[str]) -> str | None:
    """What names tell of experts in a form that is not read: the form and the remedy, or the first of them."""
    like = [name for name in names if _EXPERT_LIKE.search(name)]
    return next(filter(None, map(_form, like)), f"there is {like[0]}" if like else None)


def _other_names(names: list[str], layouts: list[Layout]) -> str:
    form = next(filter(None, map(_form, names)), None)
    if form is not None:
        return form
    templates = [template for layout in layouts for template in layout.names("gate")]
    expected = " or ".join(templates)
    for name in names:
        for layout in layouts:
            found = _with_prefix(layout, name)
            if found is not None:
                return (
                    f"tensor {name} has {found!r} where 'model.' is expected; save the whole causal language model "
                    "(AutoModelForCausalLM) with save_pretrained, not the model inside or around it"
                )
    one = next((name for name in names if _ONE_EXPERT.search(name)), None)
    if one is not None and not any(layout.templates for layout in layouts):
        return (
            f"tensor {one} is of one expert, and transformers reads those of this model_type in stacks alone "
            f"({expected}): stack them, gate above up, or start from the checkpoint that this one was made of"
        )
    shown = next((name for name in names if _EXPERT_LIKE.search(name)), names[0] if names else None)
    return (
        f"no tensor is named as routed experts of this model_type are ({expected}); found {len(names)} tensors"
        + (f", such as {shown}" if shown is not None else "")
        + ": save the model with a current transformers (save_pretrained)"
    )


def _form(name: str) -> str | None:
    for pattern, form in _FORMS:
        if pattern.search(name):
            return (
                f"the experts are stored {form} (tensor {name}); expected BF16, F16 or F32 as transformers names them: "
                "start from the checkpoint that this one was made of"
            )
    return None


def _known(layout: Layout, name: str) -> bool:
    return any(layout.place(family, name) is not None for family in ("gate", "up", "down"))


def _with_prefix(layout: Layout, name: str) -> str | None:
    """What stands before the layers in a name that is known but for that."""
    prefix, found, rest = name.partition("layers.")
    return prefix if found and prefix != "model." and _known(layout, f"model.layers.{rest}") else None
