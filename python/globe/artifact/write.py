"""Writing the factored checkpoint, shard by shard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.artifact.changed import Changed
from globe.artifact.factored import (
    BANK_FILE,
    INDEX_FILE,
    bank_name,
    csr_parts,
    left_name,
    rest_name,
    shard_name,
)
from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.packed import packed
from globe.checkpoint.formats.tensors import as_decoded
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.powers import saturated, shared, times_power
from globe.checkpoint.tensorfile import DTYPE_NAMES, TensorInfo, TensorWriter, copy_chunks, file_sha256, write_text
from globe.compute import ranks
from globe.fit.rounding import Rounded, above_least
from globe.fit.stored_lefts import Fit, Solved, solve_lefts
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.runs.store import Store

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Written:
    """Per pool, squared error and energy (N,) of every expert as stored, the ridged left factors, and
    error and energy (N, 2) as the metric sees them, and values of left factors that bf16 does not hold.

    `files` has the size and SHA-256 of every weight file.
    """

    errors: dict[str, Array]
    energies: dict[str, Array]
    ridged: dict[str, int]
    weighted: dict[str, Array]
    saturated: dict[str, int]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_weights(
    checkpoint: Checkpoint, fits: dict[str, Fit], target: Path, job: Job, changed: Mapping[str, str]
) -> Written:
    """Write every shard, the bank's file and the index.

    Each source shard becomes one factored shard, with the left factors in place of the expert tensors (of those that
    are stored as codes in place of the codes, without their scales) and all other tensors byte for byte, but for those
    `changed`, each with the store's result that has it under its own name: the left factors, where its experts are
    factored. What is measured of a shard goes to the
    job's store with the shard's SHA-256; a shard that is there and has it is not written again.
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
        dict.fromkeys(fits, 0),
    )
    weight_map: dict[str, str] = {}
    replaced = [matrix for matrix in checkpoint.encoded if matrix.name in places or matrix.name in changed]
    listed = [(*numbered, as_decoded(numbered[1].tensors, replaced)) for numbered in enumerate(checkpoint.shards)]
    total = sum(len(places.get(tensor, ())) for _, _, tensors in ranks.share(listed) for tensor in tensors)
    corrected = Changed(job.store, changed)
    with job.stages.stage("write", total, _written_before(job.store)) as advance:
        for count, shard, tensors in ranks.own(listed):
            file, result = shard_name(shard.path.name), f"shard-{count}"
            entries: dict[str, tuple[str, tuple[int, ...]]] = {}
            for tensor, info in tensors.items():
                entries.update(_entries(fits, info, tensor, places.get(tensor, [])))
            weight_map.update(dict.fromkeys(entries, file))
            there = [place for tensor in tensors for place in places.get(tensor, ())]
            meta = job.store.check(result)
            if meta is not None and _is_whole(target / file, meta):
                _recall(written, there, meta)
                advance(len(there))
                continue
            if meta is not None:
                job.log(f"{file}: not as it was written; written again")
            before, clipped = dict(written.ridged), dict(written.saturated)
            solved = solve_lefts(fits, there, job.settings, job.blocks, corrected.left)
            solutions = _recorded(there, solved, written, advance)
            with TensorWriter(target / file, entries, shard.metadata) as writer:
                for tensor, info in tensors.items():
                    if tensor in changed and tensor not in places:
                        writer.write(tensor, corrected.tensor(tensor))
                        continue
                    if isinstance(info, TensorInfo) and tensor not in places:
                        writer.write_chunks(tensor, copy_chunks(info))
                        continue
                    parts = _parts(fits, places[tensor])
                    _write_experts(writer, tensor, parts, solutions, fits)
                    for family in _kept_halves(fits, parts):
                        kept = checkpoint.family(family)
                        numbers = [i for i, expert in enumerate(kept.experts) if expert.tensor == tensor]
                        writer.write(
                            rest_name(tensor, family), torch.stack([kept.experts[i].read((0, kept.p)) for i in numbers])
                        )
            written.files[file] = {"bytes": (target / file).stat().st_size, "sha256": writer.sha256}
            measured = {
                "file": file,
                **written.files[file],
                "errors": [written.errors[name][number] for name, number in there],
                "weighted": [written.weighted[name][number].tolist() for name, number in there],
                "energies": [written.energies[name][number] for name, number in there],
                "ridged": {name: written.ridged[name] - before[name] for name in fits},
                "saturated": {name: written.saturated[name] - clipped[name] for name in fits},
                "elapsed": job.stages.so_far(),
            }
            job.store.save(result, {}, measured)
        written, weight_map = _of_all_ranks(written, weight_map)
        written.files[BANK_FILE], beyond = ranks.lead(lambda: _write_bank(fits, target / BANK_FILE, weight_map))
        beyond += sum(written.saturated.values())
        if beyond:
            job.log(f"{beyond:,} values of the factors are beyond bf16 and were written as its largest")
        size = sum(entry["bytes"] for entry in written.files.values())
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        ranks.lead(lambda: write_text(target / INDEX_FILE, json.dumps(index, indent=1) + "\n"))
    return written


def _of_all_ranks(written: Written, weight_map: dict[str, str]) -> tuple[Written, dict[str, str]]:
    """What all ranks have written, and where its tensors lie; every rank has written shards of its own."""
    if ranks.size() == 1:
        return written, weight_map

    def total(counts: dict[str, int]) -> dict[str, int]:
        return dict(zip(counts, map(int, ranks.summed_array(np.array([*counts.values()]))), strict=True))

    files = {name: file for some in ranks.gathered(written.files) for name, file in some.items()}
    places = {name: file for some in ranks.gathered(weight_map) for name, file in some.items()}
    errors, energies, weighted = (
        {name: ranks.summed_array(each) for name, each in some.items()}
        for some in (written.errors, written.energies, written.weighted)
    )
    ridged, beyond = total(written.ridged), total(written.saturated)
    found = Written(errors, energies, ridged, weighted, beyond, dict(sorted(files.items())))
    return found, dict(sorted(places.items(), key=lambda place: place[1]))


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
    for name, saturated_values in meta["saturated"].items():
        written.saturated[name] += saturated_values
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


def _kept_halves(fits: dict[str, Fit], parts: list[_Part]) -> list[str]:
    """The families of a tensor of gate and up that stay as they are."""
    first = fits[parts[0].pool].family.experts[parts[0].numbers[0]]
    held = {part.family for part in parts}
    return [name for name in ("gate", "up") if name not in held] if first.both else []


def _entries(
    fits: dict[str, Fit], info: TensorInfo | Encoded, tensor: str, there: list[tuple[str, int]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    if not there:
        return {tensor: (info.dtype, info.written_shape if isinstance(info, Encoded) else info.shape)}
    fused = len(info.shape) == 3
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts = _parts(fits, there)
    for part in parts:
        fit, name = fits[part.pool], left_name(tensor, part.family)
        shape: tuple[int, ...] = (fit.family.p, fit.state.bank.shape[1])
        shape = (info.shape[0], *shape) if fused else shape
        entries |= {name: ("BF16", shape)} if fit.lefts is None else fit.lefts.entries(name, shape)
    for half in _kept_halves(fits, parts):
        family = fits[parts[0].pool].family
        entries[rest_name(tensor, half)] = (info.dtype, (info.shape[0], family.p, family.d))
    return entries


def _recorded(
    there: list[tuple[str, int]], solutions: Iterator[Solved], written: Written, advance: Advance
) -> Iterator[Solved]:
    """The solutions in order, each noted in `written` as it is taken."""
    for (name, number), solved in zip(there, solutions, strict=True):
        written.errors[name][number], written.energies[name][number] = solved.error, solved.energy
        written.weighted[name][number] = solved.weighted
        written.ridged[name] += solved.ridged
        written.saturated[name] += solved.beyond
        advance(1)
        yield solved


def _write_experts(
    writer: TensorWriter, tensor: str, parts: list[_Part], solutions: Iterator[Solved], fits: dict[str, Fit]
) -> None:
    for part in parts:
        lefts = [solved.left for solved in itertools.islice(solutions, len(part.numbers))]
        fused = fits[part.pool].family.experts[part.numbers[0]].index is not None
        for name, value in _left_tensors(left_name(tensor, part.family), lefts, fused).items():
            writer.write(name, value)


def _left_tensors(name: str, lefts: list[torch.Tensor | Rounded], fused: bool) -> dict[str, torch.Tensor]:
    """What the left factors of a source tensor are stored as: stacked where the tensor is."""

    def together(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors) if fused else tensors[0]

    rounded = [left for left in lefts if isinstance(left, Rounded)]
    if not rounded:
        return {name: together([left for left in lefts if isinstance(left, torch.Tensor)])}
    codes, scales = together([left.codes for left in rounded]), together([left.scales for left in rounded])
    return packed(name, codes, scales, rounded[0].bits)


def _write_bank(fits: dict[str, Fit], path: Path, weight_map: dict[str, str]) -> tuple[dict[str, Any], int]:
    tensors: dict[str, torch.Tensor] = {}
    beyond = 0
    for name, fit in fits.items():
        found, count = _atom_tensors(bank_name(name, "atoms"), fit)
        tensors |= found
        beyond += count
        for part, values in csr_parts(fit.state.codes).items():
            tensors[bank_name(name, part)] = values
    entries = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    with TensorWriter(path, entries, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    weight_map.update(dict.fromkeys(entries, path.name))
    return {"bytes": path.stat().st_size, "sha256": writer.sha256}, beyond


def _atom_tensors(name: str, fit: Fit) -> tuple[dict[str, torch.Tensor], int]:
    """What a bank's atoms are stored as, and how many values or scales bf16 does not hold."""
    power, atoms = shared(fit.exponent)[1], fit.atoms
    if atoms is None:
        values, beyond = saturated(times_power(fit.state.bank.float().cpu(), power), torch.bfloat16)
        return {name: values}, beyond
    scales, beyond = saturated(above_least(times_power(atoms.scales, power)), torch.bfloat16)
    rows = fit.state.bank.shape[:2]
    return packed(name, atoms.codes.view(*rows, -1), scales.view(*rows, -1), atoms.bits), beyond
