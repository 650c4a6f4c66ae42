"""globe.json: what a factored directory holds, and what it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from globe._version import __version__
from globe.artifact.factored import FORMAT_VERSION
from globe.checkpoint.companions import companions
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.settings import Settings
from globe.sizes.ratios import Shape


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
    source, changed = told
    described: dict[str, dict[str, Any]] = {}
    for name, pool in pools.items():
        for family in pool.families:
            empty = {"experts": 0, "p": pool.p, "d": pool.d, "rank": shapes[name].rank, "bank": 0, "tensors": {}}
            described.setdefault(family, {**empty, "banks": {}})["bank"] += shapes[name].bank
        for number, expert in enumerate(pool.experts):
            entry = described[expert.family]
            entry["experts"] += 1
            entry["tensors"].setdefault(expert.tensor, []).append(number)
            entry["banks"][expert.tensor] = name
    banks = {
        name: {"experts": len(pools[name]), "rank": shape.rank, "bank": shape.bank} for name, shape in shapes.items()
    }
    shards = [
        {
            "file": shard.path.name,
            "metadata": shard.metadata,
            "tensors": {key: {"dtype": info.dtype, "shape": list(info.shape)} for key, info in shard.tensors.items()},
        }
        for shard in checkpoint.shards
    ]
    index_metadata = None
    if checkpoint.index is not None:
        stated = checkpoint.index.get("metadata")
        index_metadata = stated if isinstance(stated, dict) else {}
    return {
        "format_version": FORMAT_VERSION,
        "globe_version": __version__,
        "settings": settings.as_dict(),
        "families": described,
        "banks": banks,
        "companions": list(companions(checkpoint.directory).carried),
        "changed": sorted(changed),
        "source": {**source, "index_metadata": index_metadata, "shards": shards},
    }
