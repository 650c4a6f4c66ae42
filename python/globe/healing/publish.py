"""Healed tensors in place of the stored ones: written aside, then put in place, config.json last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from globe.artifact.card import JUDGED, with_section
from globe.artifact.factored import MANIFEST, Factored
from globe.checkpoint.json_file import read_json
from globe.checkpoint.powers import saturated
from globe.checkpoint.tensorfile import TORCH_DTYPES, FileHeader, TensorWriter, copy_chunks, write_text
from globe.healing.parts import Moving

_ASIDE, _READY = "aside", "ready.json"
_CONFIG, _METRICS, _CARD = "config.json", "metrics.json", "README.md"


def write_aside(factored: Factored, parts: list[Moving], told: dict[str, Any], folder: Path) -> None:
    """Write the files that change below the healing's folder, and say there that they are whole."""
    aside = folder / _ASIDE
    aside.mkdir(exist_ok=True)
    values = {name: value for each in parts for name, value in each.values()}
    files = {}
    for name, header in factored.shards.items():
        if not values.keys().isdisjoint(header.tensors):
            sha256 = _write_shard(header, values, aside / name)
            files[name] = {"bytes": (aside / name).stat().st_size, "sha256": sha256}
    healed = sorted({*factored.manifest.get("healed", ()), *values})
    _write_json(aside / MANIFEST, {**factored.manifest, "healed": healed})
    names = [*files, MANIFEST]
    for name in (_METRICS, _CARD):
        if (factored.directory / name).exists():
            names.append(name)
    if _METRICS in names:
        metrics = read_json(factored.directory / _METRICS)
        metrics["files"] = {**metrics.get("files", {}), **files}
        _write_json(aside / _METRICS, {**metrics, "healing": [*metrics.get("healing", ()), told]})
    if _CARD in names:
        card = (factored.directory / _CARD).read_text(encoding="utf-8")
        card = with_section(card, JUDGED, None)  # of the weights of before
        write_text(aside / _CARD, card.rstrip("\n") + "\n\n" + _paragraph(told, len(healed)))
    write_text(aside / _CONFIG, (factored.directory / _CONFIG).read_text(encoding="utf-8"))
    _write_json(folder / _READY, {"names": names})


def put_in_place(out: Path, folder: Path) -> None:
    """Move the files that are ready to their places.

    config.json goes first and comes back last: a directory of which some files are healed and some are not has none.
    """
    aside = folder / _ASIDE
    if (aside / _CONFIG).exists():
        (out / _CONFIG).unlink(missing_ok=True)
    for name in [*read_json(folder / _READY)["names"], _CONFIG]:
        if (aside / name).exists():
            os.replace(aside / name, out / name)


def finish(out: Path, folder: Path) -> bool:
    """Put in place what a run had begun to put there when it was stopped; whether there was such.

    Where config.json stands on both sides nothing had moved yet, or the directory was made anew.
    """
    whole = (out / _CONFIG).exists()
    if not (folder / _READY).exists() or (whole and (folder / _ASIDE / _CONFIG).exists()):
        return False
    put_in_place(out, folder)
    return True


def _write_shard(header: FileHeader, values: dict[str, torch.Tensor], path: Path) -> str:
    metadata = json.loads(header.raw).get("__metadata__")
    entries = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    with TensorWriter(path, entries, metadata) as writer:
        for name, info in header.tensors.items():
            if name in values:
                writer.write(name, saturated(values[name].cpu(), TORCH_DTYPES[info.dtype])[0])
            else:
                writer.write_chunks(name, copy_chunks(info))
    return writer.sha256


def _paragraph(told: dict[str, Any], count: int) -> str:
    rows = "\n".join(
        f"| {label} | {before:.3f} | {told['after'][label]:.3f} |" for label, before in told["before"].items()
    )
    return (
        f"## Healed\n\nAfterwards the model learned from the original for {told['steps']:,} steps of "
        f"{told['tokens_per_step']:,} tokens (KL of the logits). {count} tensors are no longer as fitted, or the "
        f"source's ({', '.join(told['options']['parts'])}; `healed` of {MANIFEST} names them), and the errors above "
        f"are those before.\n\n| held-out text | perplexity before | after |\n| --- | --- | --- |\n{rows}\n"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
