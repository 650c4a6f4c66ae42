"""The weight files of a checkpoint directory: which they are, and which tensors of theirs count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from globe.checkpoint.json_file import read_json
from globe.checkpoint.tensorfile import FileHeader, read_header
from globe.errors import GlobeError

INDEX_NAME = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_shards(directory: Path) -> tuple[dict[str, Any] | None, list[FileHeader], list[str]]:
    """The index, if there is one; the shards' headers, each with the tensors that count as its own; and what is noted.

    Raises
    ------
    GlobeError
        If a file is missing, truncated or inconsistent with the index, or a tensor is in two files.
    """
    index, names = _named(directory)
    weight_map: dict[str, str] = index["weight_map"] if index is not None else {}
    shards: list[FileHeader] = []
    holds: dict[str, str] = {}
    noted: list[str] = []
    for header in (read_header(directory / name) for name in names):
        mine = header.path.name
        kept = {name: info for name, info in header.tensors.items() if weight_map.get(name, mine) == mine}
        for name in sorted(kept.keys() & holds.keys()):
            raise GlobeError(f"tensor {name} is in both {holds[name]} and {mine}; expected one: fetch both again")
        holds |= dict.fromkeys(kept, mine)
        shards.append(replace(header, tensors=kept))
        noted += _left_out(header, kept, weight_map)
    for name, file in weight_map.items():
        if holds.get(name) != file:
            raise GlobeError(f"{INDEX_NAME} names tensor {name} in {file}, which does not hold it; fetch both again")
    return index, shards, noted


def _left_out(header: FileHeader, kept: Mapping[str, Any], weight_map: Mapping[str, str]) -> list[str]:
    """What is said of a file's tensors that the index names elsewhere."""
    left = sorted(header.tensors.keys() - kept.keys())
    if not left:
        return []
    more = f" and {len(left) - 1} more are" if len(left) > 1 else " is"
    where = "other files" if len(left) > 1 else weight_map[left[0]]
    return [
        f"{header.path.name}: tensor {left[0]}{more} left out, for {INDEX_NAME} names {where}; "
        "transformers may read it instead"
    ]


def _named(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, and the names of the shards."""
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        if (directory / SINGLE).exists():
            return None, [SINGLE]
        raise GlobeError(f"{directory}: neither {SINGLE} nor {INDEX_NAME} found; fetch the weights")
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GlobeError(f"{index_path}: weight_map is missing or empty; fetch the index again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise GlobeError(
                f"{index_path}: tensor {tensor} is mapped to {name!r}; expected a file name: fetch it again"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise GlobeError(
                f"{index_path}: shard {name!r} lies outside the directory; expected a file name: fetch it again"
            )
        if not (directory / name).exists():
            raise GlobeError(f"{directory}: shard {name} named by {INDEX_NAME} is missing; fetch it")
    if SINGLE not in names and (directory / SINGLE).exists():
        raise GlobeError(
            f"{directory}: {SINGLE} is not named by {INDEX_NAME}, and transformers reads it instead of the files that "
            "are; remove the one or the other"
        )
    return index, names
