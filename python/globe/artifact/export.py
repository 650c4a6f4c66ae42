"""The reconstructed dense checkpoint, from a factored directory alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from globe.artifact.as_source import as_stored, require_fp8, write_requantised
from globe.artifact.autoload import source_config
from globe.artifact.factored import Bank, Factored, open_factored, rest_name, shard_name
from globe.artifact.output import output_directory
from globe.artifact.owned import Claim, recorded
from globe.checkpoint.companions import companions, copy_companions
from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.tensors import described, recalled
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.json_file import read_json
from globe.checkpoint.layouts import FAMILIES
from globe.checkpoint.powers import saturated
from globe.checkpoint.quantised import KEY, with_quantization
from globe.checkpoint.shards import INDEX_NAME
from globe.checkpoint.tensorfile import (
    TORCH_DTYPES,
    TensorInfo,
    TensorWriter,
    copy_chunks,
    read_tensor,
    tensor_bytes,
    write_text,
)
from globe.errors import GlobeError, UsageError
from globe.runs.stages import Advance, Display, Stages


def export(
    source: Path | str,
    target: Path | str,
    *,
    overwrite: bool = False,
    as_source: bool = False,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Write the dense checkpoint Ŵ_i = A_i Σ_j α_ij B_j with the source's own names, dtype and shards.

    Routed experts that the source stores as codes are decoded, the factored ones and the others: transformers builds
    the experts of a layer in one format.

    Parameters
    ----------
    source : Path or str
        A factored directory.
    target : Path or str
        The dense directory; made here.
    overwrite : bool
        Replace the files of a target that is not empty: those of the names that are written now, and those that its
        own index or GloBE's records there name. Others stay.
    as_source : bool
        Routed experts that the source stores in fp8 come out in fp8 again, with scales made anew where they are
        factored, and config.json has the source's own `quantization_config`.
    progress : Display, optional
        Shows the stage.

    Returns
    -------
    dict
        `output`, `tensors`, `bytes`, `stages`, and `saturated`: values that were beyond their tensor's dtype and are
        its largest.

    Raises
    ------
    UsageError
        If `as_source` is asked for and the source is not fp8.
    GlobeError
        If `source` is not a whole factored directory, or `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    factored = open_factored(source)
    config = read_json(source / "config.json")
    record = factored.manifest["source"]
    _refuse_the_source(target, record)
    if as_source:
        require_fp8(source, record)
    written = {shard["file"]: _entries(shard, as_source) for shard in record["shards"]}
    total = sum(tensor_bytes(*entry) for entries in written.values() for entry in entries.values())
    stages, beyond = Stages(progress), 0
    shards = [shard["file"] for shard in record["shards"]]
    claim = Claim(source, ("config.json", INDEX_NAME, *shards, *companions(source).carried), total)
    left = companions(source, frozenset(recorded(source))).left
    if left:
        stages.display.log(f"left behind: {', '.join(left)}")
    with output_directory(target, claim, overwrite=overwrite, log=stages.display.log) as directory:
        with stages.stage("export", sum(len(shard["tensors"]) for shard in record["shards"])) as advance:
            banks = {name: factored.bank(name) for name in factored.manifest["banks"]}
            work = _Work(factored, banks, directory, as_source)
            for shard in record["shards"]:
                beyond += _export_shard(work, shard, advance)
        if beyond:
            stages.display.log(
                f"{beyond:,} values are beyond the dtype of their tensors and were written as its largest"
            )
        copy_companions(source, directory)
        if record["index_metadata"] is not None:
            weight_map = {name: file for file, entries in written.items() for name in entries}
            index = {"metadata": record["index_metadata"], "weight_map": dict(sorted(weight_map.items()))}
            write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        told = source_config(config)
        if as_source:
            told = with_quantization(told, record[KEY], record.get(f"{KEY}_inside"))
        write_text(directory / "config.json", json.dumps(told, indent=2) + "\n")
    return {
        "output": str(target),
        "tensors": sum(map(len, written.values())),
        "bytes": total,
        "saturated": beyond,
        "stages": stages.as_list(),
    }


def _refuse_the_source(target: Path, record: dict[str, Any]) -> None:
    """Refuse to write over the checkpoint that was compressed, wherever it lies now."""
    if not any((target / shard["file"]).is_file() for shard in record["shards"]):
        return
    try:
        fingerprint = Checkpoint(target).fingerprint()
    except GlobeError:
        return
    if fingerprint == record["fingerprint"]:
        raise UsageError(f"output {target} is the checkpoint that was compressed; name another directory")


def _entries(shard: dict[str, Any], as_source: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that are written of a shard, with dtypes and shapes."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in shard["tensors"].items():
        if as_source and entry.keys() & {"encoded", "origin"}:
            found |= as_stored(name, entry)
        else:
            found[name] = (entry["dtype"], tuple(entry["shape"]))
    return found


@dataclass(frozen=True)
class _Work:
    """What an export makes its shards of, where, and whether experts come out in the source's codes."""

    factored: Factored
    banks: dict[str, Bank]
    directory: Path
    as_source: bool


def _export_shard(work: _Work, shard: dict[str, Any], advance: Advance) -> int:
    """Write a shard; the number of values that its dtype does not hold."""
    beyond, factored = 0, work.factored
    stored = factored.shards[shard_name(shard["file"])].tensors
    entries = _entries(shard, work.as_source)
    with TensorWriter(work.directory / shard["file"], entries, shard["metadata"]) as writer:
        for name, entry in shard["tensors"].items():
            if "encoded" in entry and work.as_source:
                for tensor in as_stored(name, entry):
                    writer.write_chunks(tensor, copy_chunks(factored.tensors[tensor]))
            elif "encoded" in entry:
                writer.write_parts(name, _decoded(recalled(name, entry, factored.tensors)))
            elif name in stored and not (work.as_source and "origin" in entry):
                writer.write_chunks(name, copy_chunks(stored[name]))
            else:
                made = _Made(factored, work.banks, name, entry)
                refitted = name in stored  # in place of codes
                experts = _as_they_are(stored[name]) if refitted else made.experts()
                if work.as_source and "origin" in entry:
                    write_requantised(writer, described(name, entry), experts)
                else:
                    writer.write_parts(name, experts)
                beyond += made.beyond
            advance(1)
    return beyond


def _decoded(matrix: Encoded) -> Iterator[torch.Tensor]:
    """A matrix of codes, or the matrices of a stack one after the other, as they are written."""
    for place in range(matrix.shape[0]) if len(matrix.shape) == 3 else (None,):
        values = matrix.read(None, place)
        yield values.mT if matrix.turned else values


def _as_they_are(info: TensorInfo) -> Iterator[torch.Tensor]:
    for place in range(info.shape[0]) if len(info.shape) == 3 else (None,):
        yield read_tensor(info, None, place)


def reconstruct(
    factored: Factored, banks: dict[str, Bank], name: str, entry: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """One source tensor from its factors, in the source's dtype, and how many values stand at that dtype's largest."""
    made = _Made(factored, banks, name, entry)
    return torch.stack(list(made.experts())).reshape(entry["shape"]), made.beyond


@dataclass
class _Made:
    """A source tensor made of its factors, and how many values of it stand at its dtype's largest so far."""

    factored: Factored
    banks: dict[str, Bank]
    name: str
    entry: dict[str, Any]
    beyond: int = 0

    def experts(self) -> Iterator[torch.Tensor]:
        """Its matrix, or the matrices of a stack one after the other, in the source's dtype."""
        factored, name, entry = self.factored, self.name, self.entry
        held = {family: factored.lefts(family, name) for family in FAMILIES if factored.holds(family, name)}
        for place in range(entry["shape"][0] if len(entry["shape"]) == 3 else 1):
            parts = []
            for family in FAMILIES:
                rest = factored.tensors.get(rest_name(name, family))
                if family in held:
                    number = factored.manifest["families"][family]["tensors"][name][place]
                    bank = self.banks[factored.bank_of(family, name)]
                    parts.append(self._rounded(_product(held[family][place], bank.mixture(number)), family))
                elif rest is not None:
                    parts.append(read_tensor(rest, None, place))
            both = torch.stack(parts, 1).flatten(0, 1) if entry.get("interleaved") else torch.cat(parts)
            yield both.mT if entry.get("transposed") else both

    def _rounded(self, product: torch.Tensor, family: str) -> torch.Tensor:
        part, count = saturated(product, TORCH_DTYPES[self.entry["dtype"]])
        self.beyond += count
        return part.mT if family == "down" else part


def _product(left: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    product = left @ mixture
    return product if bool(product.isfinite().all()) else left.double() @ mixture.double()
