"""globe.json: what a factored directory holds, and what it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from globe._version import __version__
from globe.artifact.factored import CODES_VERSION, FORMAT_VERSION, PLAIN_VERSION
from globe.checkpoint.companions import companions
from globe.checkpoint.family import Family
from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.packed import Packing
from globe.checkpoint.formats.tensors import as_decoded
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.quantised import KEY, quantization_of, quantization_place
from globe.checkpoint.tensorfile import TensorInfo
from globe.settings import Settings
from globe.sizes.ratios import BF16, Shape


def manifest(
    checkpoint: Checkpoint,
    pools: dict[str, Family],
    shapes: dict[str, Shape],
    settings: Settings,
    told: tuple[dict[str, Any], Iterable[str]],
) -> dict[str, Any]:
    """globe.json: all that export needs, so that the source need not exist any more.

    `told` is what is said of the source, and which of the tensors that are not factored are no longer the source's.
    """
    source, changed = told[0], sorted(told[1])
    described: dict[str, dict[str, Any]] = {}
    for name, pool in pools.items():
        for family in pool.families:
            empty = {"experts": 0, "p": pool.p, "d": pool.d, "rank": shapes[name].rank, "bank": 0, "tensors": {}}
            empty |= _packed(shapes[name].storage.lefts)
            described.setdefault(family, {**empty, "banks": {}})["bank"] += shapes[name].bank
        for number, expert in enumerate(pool.experts):
            entry = described[expert.family]
            entry["experts"] += 1
            entry["tensors"].setdefault(expert.tensor, []).append(number)
            entry["banks"][expert.tensor] = name
    banks = {
        name: {"experts": len(pools[name]), "rank": shape.rank, "bank": shape.bank, **_packed(shape.storage.atoms)}
        for name, shape in shapes.items()
    }
    kept = {matrix.name for matrix in checkpoint.encoded} - {
        tensor for f in described.values() for tensor in f["tensors"]
    }
    kept -= set(changed)
    lies = _lies(checkpoint)
    shards = [
        {
            "file": shard.path.name,
            "metadata": shard.metadata,
            "tensors": {
                key: _entry(key, info, kept) | lies.get(key, {})
                for key, info in as_decoded(shard.tensors, checkpoint.encoded).items()
            },
        }
        for shard in checkpoint.shards
    ]
    index_metadata = None
    if checkpoint.index is not None:
        stated = checkpoint.index.get("metadata")
        index_metadata = stated if isinstance(stated, dict) else {}
    newest = kept or any(shape.storage != BF16 for shape in shapes.values())
    quantization = {KEY: quantization_of(checkpoint.config)} if checkpoint.encoded else {}
    place = quantization_place(checkpoint.config)
    if quantization and place:
        quantization[f"{KEY}_inside"] = place
    return {
        "format_version": FORMAT_VERSION if lies else CODES_VERSION if newest else PLAIN_VERSION,
        "globe_version": __version__,
        "settings": settings.as_dict(),
        "families": described,
        "banks": banks,
        "companions": list(companions(checkpoint.directory).carried),
        "changed": changed,
        "source": {**source, **quantization, "index_metadata": index_metadata, "shards": shards},
    }


def _packed(packing: Packing | None) -> dict[str, Any]:
    return {} if packing is None else {"packed": packing.as_dict()}


def _entry(name: str, info: TensorInfo | Encoded, kept: set[str]) -> dict[str, Any]:
    """What an export has under a name; of a matrix of codes also how they are decoded, or how the source had them."""
    shape = info.written_shape if isinstance(info, Encoded) else info.shape
    entry: dict[str, Any] = {"dtype": info.dtype, "shape": list(shape)}
    if isinstance(info, Encoded):
        entry["encoded" if name in kept else "origin"] = info.as_dict()
    return entry


def _lies(checkpoint: Checkpoint) -> dict[str, dict[str, bool]]:
    """By tensor, which way a stack of experts lies if not [E, outputs, inputs] with gate above up."""
    found: dict[str, dict[str, bool]] = {}
    for name in checkpoint.layout.families:
        for expert in checkpoint.family(name).experts:
            if expert.written_transposed or expert.step > 1:
                told = {"transposed": expert.written_transposed, "interleaved": expert.step > 1}
                found[expert.tensor] = {key: value for key, value in told.items() if value}
    return found
