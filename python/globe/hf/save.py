"""`save_pretrained` of a factored model: a directory that loads as the one it came from does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from globe.artifact.autoload import LOADER, marked
from globe.artifact.factored import INDEX_FILE, MANIFEST, shard_name
from globe.checkpoint.companions import LOADER_FILE
from globe.checkpoint.json_file import read_json
from globe.checkpoint.shards import INDEX_NAME
from globe.checkpoint.tensorfile import write_text
from globe.errors import UsageError

_SINGLE = "model.safetensors"


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    *arguments: Any,
    push_to_hub: bool = False,
    variant: str | None = None,
    **options: Any,
) -> None:
    """Save factors, banks and config.json; stands in for the method of the model's class.

    The weight files get names for which transformers alone does not look. The directory is for `from_pretrained` and
    has no globe.json, which `globe export` reads.

    Raises
    ------
    UsageError
        If the directory is the output of globe compress, or an argument is given that cannot be heeded.
    """
    directory = Path(save_directory)
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory}: holds the output of globe compress; name another directory")
    if push_to_hub or variant is not None:
        raise UsageError("a factored model takes neither push_to_hub nor variant here; use model.push_to_hub(...)")
    type(model).save_pretrained(model, save_directory, *arguments, **options)
    if (arguments[0] if arguments else options.get("is_main_process", True)) and directory.is_dir():
        _mark(directory)


def save_offloaded(model: Any, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
    """Refuse to save a model whose experts are in the files that it was loaded from.

    Raises
    ------
    UsageError
    """
    raise UsageError(f"{save_directory}: nothing is saved of a model with offload; load it without, or copy its files")


def _mark(directory: Path) -> None:
    for old in [*directory.glob("globe*.safetensors"), directory / INDEX_FILE]:
        old.unlink(missing_ok=True)
    sharded = (directory / INDEX_NAME).exists() and not (directory / _SINGLE).exists()
    if sharded:
        index = read_json(directory / INDEX_NAME)
        index["weight_map"] = {name: shard_name(file) for name, file in index["weight_map"].items()}
        write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        (directory / INDEX_NAME).unlink()
    for file in directory.glob("model*.safetensors"):
        file.rename(directory / shard_name(file.name))
    config = read_json(directory / "config.json")
    told = marked(config, config["quantization_config"], INDEX_FILE if sharded else shard_name(_SINGLE))
    write_text(directory / LOADER_FILE, LOADER)
    write_text(directory / "config.json", json.dumps(told, indent=2, sort_keys=True) + "\n")
