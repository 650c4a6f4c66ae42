"""Writing the factored checkpoint, shard by shard, with left factors fitted to the atoms as stored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe import __version__
from globe.budget import BLOCKS, Blocks
from globe.checkpoint import Checkpoint, Family
from globe.factored import (
    BANK_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    bank_name,
    csr_parts,
    left_name,
    rest_name,
    shard_name,
)
from globe.gemm import matmul, mixtures, weights_operand
from globe.lefts import fit_lefts, row_energies, squared_errors
from globe.metric import Metric
from globe.ratios import Shape
from globe.runstore import Store
from globe.settings import Settings
from globe.stages import Advance, Stages
from globe.stream import Workers, ahead
from globe.sweep import State
from globe.tensorfile import DTYPE_NAMES, TensorInfo, TensorWriter, copy_chunks, file_sha256, write_text

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A pool with the state to be stored: atoms rounded to bf16 (on the CPU they are in bf16), codes to fp32."""

    family: Family
    state: State
    metric: Metric | None = None


@dataclass(frozen=True)
class Written:
    """Per pool, squared error and energy (N,) of every expert as stored, the ridged left factors, and
    error and energy (N, 2) as the metric sees them.

    `files` has the size and SHA-256 of every weight file.
    """

    errors: dict[str, Array]
    energies: dict[str, Array]
    ridged: dict[str, int]
    weighted: dict[str, Array]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def rounded(state: State) -> State:
    """The state as it is stored: atoms in bf16 on the CPU, codes in fp32 (of fp64 type)."""
    codes = state.codes.astype(np.float32).astype(np.float64)
    return State(state.bank.bfloat16().cpu(), codes, state.temperature)


def write_weights(
    checkpoint: Checkpoint,
    fits: dict[str, Fit],
    target: Path,
    settings: Settings,
    stages: Stages,
    store: Store,
    blocks: Blocks = BLOCKS,
) -> Written:
    """Write every shard, the bank's file and the index.

    Each source shard becomes one factored shard, with the left factors in place of the expert tensors and
    all other tensors byte for byte. What is measured of a shard goes to `store`
    with the shard's SHA-256; a shard that is there and has it is not written again.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for name, fit in fits.items():
        for number, expert in enumerate(fit.family.experts):
            places.setdefault(expert.tensor, []).append((name, number))
    written = Written(
        {name: np.zeros(len(fit.family)) for name, fit in fits.items()},
        {name: np.zeros(len(fit.family)) for name, fit in fits.items()},
        dict.fromkeys(fits, 0),
        {name: np.zeros((len(fit.family), 2)) for name, fit in fits.items()},
    )
    weight_map: dict[str, str] = {}
    total = sum(len(fit.family) for fit in fits.values())
    with stages.stage("write", total, _written_before(store)) as advance:
        for count, shard in enumerate(checkpoint.shards):
            file, result = shard_name(shard.path.name), f"shard-{count}"
            entries: dict[str, tuple[str, tuple[int, ...]]] = {}
            for tensor, info in shard.tensors.items():
                entries.update(_entries(checkpoint, fits, info, tensor, places.get(tensor, [])))
            weight_map.update(dict.fromkeys(entries, file))
            there = [place for tensor in shard.tensors for place in places.get(tensor, ())]
            meta = store.check(result)
            if meta is not None and _is_whole(target / file, meta):
                _recall(written, there, meta)
                advance(len(there))
                continue
            if meta is not None:
                stages.display.log(f"{file}: not as it was written; written again")
            before, solutions = dict(written.ridged), _solve(fits, there, settings, blocks)
            with TensorWriter(target / file, entries, shard.metadata) as writer:
                for tensor, info in shard.tensors.items():
                    if tensor not in places:
                        writer.write_chunks(tensor, copy_chunks(info))
                        continue
                    parts = _parts(fits, places[tensor])
                    _write_experts(writer, tensor, fits, parts, solutions, written, advance)
                    for family in _kept_halves(checkpoint, parts):
                        kept = checkpoint.family(family)
                        numbers = [i for i, expert in enumerate(kept.experts) if expert.tensor == tensor]
                        writer.write(rest_name(tensor, family), torch.stack([kept.read(i) for i in numbers]))
            written.files[file] = {"bytes": (target / file).stat().st_size, "sha256": writer.sha256}
            measured = {
                "file": file,
                **written.files[file],
                "errors": [written.errors[name][number] for name, number in there],
                "weighted": [written.weighted[name][number].tolist() for name, number in there],
                "energies": [written.energies[name][number] for name, number in there],
                "ridged": {name: written.ridged[name] - before[name] for name in fits},
                "elapsed": stages.so_far(),
            }
            store.save(result, {}, measured)
        sha256 = _write_bank(fits, target / BANK_FILE, weight_map)
        written.files[BANK_FILE] = {"bytes": (target / BANK_FILE).stat().st_size, "sha256": sha256}
        size = sum(entry["bytes"] for entry in written.files.values())
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(target / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return written


def _written_before(store: Store) -> dict[str, Any] | None:
    """The record of the shards that an earlier process wrote."""
    shards = (store.check(name) for name in store.names() if name.startswith("shard-"))
    records = [meta["elapsed"] for meta in shards if meta is not None]
    return max(records, key=lambda record: float(record["seconds"]), default=None)


def _is_whole(path: Path, meta: dict[str, Any]) -> bool:
    there = path.name == meta["file"] and path.is_file() and path.stat().st_size == meta["bytes"]
    return there and file_sha256(path) == meta["sha256"]


def _recall(written: Written, there: list[tuple[str, int]], meta: dict[str, Any]) -> None:
    for (name, number), error, energy in zip(there, meta["errors"], meta["energies"], strict=True):
        written.errors[name][number], written.energies[name][number] = error, energy
    for (name, number), weighted in zip(there, meta["weighted"], strict=True):
        written.weighted[name][number] = weighted
    for name, ridged in meta["ridged"].items():
        written.ridged[name] += ridged
    written.files[meta["file"]] = {"bytes": meta["bytes"], "sha256": meta["sha256"]}


@dataclass(frozen=True)
class _Part:
    """The experts of one family in one source tensor: their pool, and their numbers there."""

    family: str
    pool: str
    numbers: list[int]


def _parts(fits: dict[str, Fit], there: list[tuple[str, int]]) -> list[_Part]:
    """The parts of a source tensor whose experts lie `there`, in that order."""
    runs = itertools.groupby(there, lambda place: (fits[place[0]].family.experts[place[1]].family, place[0]))
    return [_Part(family, pool, [number for _, number in run]) for (family, pool), run in runs]


def _kept_halves(checkpoint: Checkpoint, parts: list[_Part]) -> list[str]:
    """The families of a fused tensor that stay as they are."""
    held = {part.family for part in parts}
    if checkpoint.layout.fused is None or "down" in held:
        return []
    return [name for name in ("gate", "up") if name not in held]


def _entries(
    checkpoint: Checkpoint, fits: dict[str, Fit], info: TensorInfo, tensor: str, there: list[tuple[str, int]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    if not there:
        return {tensor: (info.dtype, info.shape)}
    fused = checkpoint.layout.fused is not None
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts = _parts(fits, there)
    for part in parts:
        shape = (fits[part.pool].family.p, fits[part.pool].state.bank.shape[1])
        entries[left_name(tensor, part.family)] = ("BF16", (info.shape[0], *shape) if fused else shape)
    for name in _kept_halves(checkpoint, parts):
        entries[rest_name(tensor, name)] = (info.dtype, (info.shape[0], info.shape[1] // 2, info.shape[2]))
    return entries


@dataclass(frozen=True)
class _Solved:
    """A left factor as stored (p, r), and what is measured with it."""

    left: torch.Tensor
    error: float
    energy: float
    ridged: bool
    weighted: tuple[float, float]


def _solve(fits: dict[str, Fit], order: list[tuple[str, int]], settings: Settings, blocks: Blocks) -> Iterator[_Solved]:
    """The experts' left factors in order; some are computed while the caller writes the last ones."""
    device = next(iter(fits.values())).state.bank.device
    groups = [order[first : first + blocks.experts] for first in range(0, len(order), blocks.experts)]

    def reading(group: list[tuple[str, int]]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [fits[name].family.read(number) for name, number in group]

    readings = ahead(map(reading, groups))
    with Workers(device) as workers:

        def solving(group: list[tuple[str, int]]) -> Callable[[], list[_Solved]]:
            def solve() -> list[_Solved]:
                weights, mixed = next(readings), _mixed(fits, group)
                return list(
                    workers.map(
                        lambda k: _solve_one(
                            weights[k][None].to(device), mixed[k], settings, fits[group[k][0]].metric, group[k][1]
                        ),
                        len(group),
                    )
                )

            return solve

        jobs = map(solving, groups)
        for solved in ahead(jobs) if device.type == "cpu" else (job() for job in jobs):
            yield from solved


def _mixed(fits: dict[str, Fit], group: list[tuple[str, int]]) -> list[torch.Tensor]:
    """B̃_i (1, r, d) of experts of any pools, each bank read once."""
    mixed: dict[tuple[str, int], torch.Tensor] = {}
    for name, fit in fits.items():
        numbers = [number for family, number in group if family == name]
        if numbers:
            composed = mixtures(fit.state.codes[numbers], fit.state.bank)
            mixed.update(zip([(name, number) for number in numbers], composed.split(1), strict=True))
    return [mixed[place] for place in group]


def _solve_one(
    weights: torch.Tensor, mixed: torch.Tensor, settings: Settings, metric: Metric | None, number: int
) -> _Solved:
    weights = weights_operand(weights)
    energy = row_energies(weights)
    if metric is None:
        fit = fit_lefts(weights, mixed, settings)
        stored = fit.lefts.bfloat16()
        errors = squared_errors(weights, energy, mixed, fit, stored.float())
        found = float(errors.sum()), float(energy.sum())
        return _Solved(stored[0].cpu(), *found, bool(fit.ridged[0]), found)
    wanted, seen = metric.seen(number, weights[0].float()), metric.seen(number, mixed[0])
    fit = fit_lefts(wanted[None], seen[None], settings)
    stored = fit.lefts.bfloat16()
    lost = weights[0].float() - matmul(stored[0].float(), mixed[0])
    weighted = metric.weigh_rows(number, wanted - matmul(stored[0].float(), seen)), metric.weigh_rows(number, wanted)
    both = _square(weighted[0]), _square(weighted[1])
    return _Solved(stored[0].cpu(), _square(lost), float(energy.sum()), bool(fit.ridged[0]), both)


def _square(matrix: torch.Tensor) -> float:
    return float(row_energies(matrix[None]).sum())


def _write_experts(
    writer: TensorWriter,
    tensor: str,
    fits: dict[str, Fit],
    parts: list[_Part],
    solutions: Iterator[_Solved],
    written: Written,
    advance: Advance,
) -> None:
    for part in parts:
        name, lefts = part.pool, []
        for number in part.numbers:
            solved = next(solutions)
            written.errors[name][number], written.energies[name][number] = solved.error, solved.energy
            written.weighted[name][number] = solved.weighted
            written.ridged[name] += solved.ridged
            lefts.append(solved.left)
            advance(1)
        fused = fits[name].family.experts[0].index is not None
        writer.write(left_name(tensor, part.family), torch.stack(lefts) if fused else lefts[0])


def _write_bank(fits: dict[str, Fit], path: Path, weight_map: dict[str, str]) -> str:
    tensors: dict[str, torch.Tensor] = {}
    for name, fit in fits.items():
        tensors[bank_name(name, "atoms")] = fit.state.bank.bfloat16().cpu()
        for part, values in csr_parts(fit.state.codes).items():
            tensors[bank_name(name, part)] = values
    entries = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    with TensorWriter(path, entries, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    weight_map.update(dict.fromkeys(entries, path.name))
    return writer.sha256


def manifest(
    checkpoint: Checkpoint,
    pools: dict[str, Family],
    shapes: dict[str, Shape],
    settings: Settings,
    source: dict[str, Any],
) -> dict[str, Any]:
    """globe.json: all that export needs, so that the source need not exist any more."""
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
        "source": {**source, "index_metadata": index_metadata, "shards": shards},
    }
