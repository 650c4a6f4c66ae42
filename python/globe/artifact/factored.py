"""The factored checkpoint: names, files, and reading back B̃ and W̃ from OUT alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from globe.checkpoint.formats.packed import Packing, dequantised, read_codes, read_packing
from globe.checkpoint.formats.tensors import described, recalled
from globe.checkpoint.json_file import read_json
from globe.checkpoint.layouts import FAMILIES
from globe.checkpoint.tensorfile import FileHeader, TensorInfo, read_header, read_tensor
from globe.compute.gemm import mixtures
from globe.compute.spd import orthonormal_rows
from globe.errors import GlobeError

FORMAT_VERSION = 4  # stacks of experts that are transposed or interleaved
CODES_VERSION = 3  # packed factors, or experts that stay stored as codes
PLAIN_VERSION = 2  # neither
MANIFEST = "globe.json"
BANK_FILE = "globe-bank.safetensors"
INDEX_FILE = "globe.safetensors.index.json"


def shard_name(source: str) -> str:
    """The factored shard that holds a source shard's tensors.

    The names are not those that transformers looks for, so a loader without GloBE refuses the directory
    instead of leaving the experts random.
    """
    return "globe" + source.removeprefix("model") if source.startswith("model") else "globe-" + source


def left_name(tensor: str, family: str) -> str:
    """The tensor of left factors A_i ([p, r], or [E, p, r] for a fused source tensor), of down those of W_iᵀ."""
    return f"{tensor}.globe_{family}_left"


def rest_name(tensor: str, family: str) -> str:
    """The tensor of the half of a fused source tensor that is not compressed ([E, p, d])."""
    return f"{tensor}.globe_{family}_dense"


def bank_name(name: str, part: str) -> str:
    """A tensor in the bank's file; `part` is atoms, codes.indptr, codes.indices or codes.values."""
    return f"globe.{name}.{part}"


@dataclass(frozen=True)
class Bank:
    """Stored atoms (m, r, d), fp32 in memory, and the codes (N, m) of the experts that share them.

    `orthonormal` where left factors are packed: they multiply mixtures whose rows were made orthonormal.
    """

    atoms: torch.Tensor
    codes: scipy.sparse.csr_array
    orthonormal: bool = False

    def mixture(self, number: int) -> torch.Tensor:
        """B̃_i, (r, d) in fp32."""
        row = self.codes[[number]].toarray()
        found = mixtures(row, self.atoms)
        return (orthonormal_rows(found) if self.orthonormal else found)[0]


@dataclass(frozen=True)
class Factored:
    """An opened factored directory: its manifest (globe.json) and the headers of its files."""

    directory: Path
    manifest: dict[str, Any]
    shards: dict[str, FileHeader]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all its files."""
        return {name: info for header in self.shards.values() for name, info in header.tensors.items()}

    @cached_property
    def source_tensors(self) -> dict[str, Any]:
        """What the manifest says of every tensor of the source, in its order."""
        return {name: entry for shard in self.manifest["source"]["shards"] for name, entry in shard["tensors"].items()}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor of the source.

        Raises
        ------
        GlobeError
            If the source has none of that name.
        """
        entry = self.source_tensors.get(tensor)
        if entry is None:
            raise GlobeError(f"{self.directory}: the source has no tensor {tensor}")
        return tuple(entry["shape"])

    def bank_of(self, family: str, tensor: str) -> str:
        """The name of the bank of which the experts of a family in a source tensor are made."""
        name: str = self.manifest["families"][family]["banks"][tensor]
        return name

    def bank(self, family: str) -> Bank:
        """Read a bank's atoms and codes by its name, which is the family's where it has one for itself."""
        tensors, described = self.shards[BANK_FILE].tensors, self.manifest["banks"][family]
        indptr, indices, values = (
            read_tensor(tensors[bank_name(family, part)]) for part in ("codes.indptr", "codes.indices", "codes.values")
        )
        atoms = _values(tensors, bank_name(family, "atoms"), self._packing(described))
        shape = (len(indptr) - 1, len(atoms))
        rows = indptr.long()
        if rows[0] != 0 or rows[-1] != len(indices) or (rows.diff() < 0).any():
            raise self._damaged(family, "codes.indptr", f"ascending offsets from 0 to {len(indices)}")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(atoms):
            raise self._damaged(family, "codes.indices", f"atoms from 0 to {len(atoms) - 1}")
        for part, stored in (("codes.values", values), ("atoms", atoms)):
            if not stored.isfinite().all():
                raise self._damaged(family, part, "finite values")
        codes = scipy.sparse.csr_array((values.numpy(), indices.numpy(), indptr.numpy()), shape=shape)
        families = self.manifest["families"].values()
        packed = any("packed" in told and family in told["banks"].values() for told in families)
        return Bank(atoms, codes, packed)

    def holds(self, family: str, tensor: str) -> bool:
        """Whether the experts of a family in a source tensor are factored."""
        return family in self.manifest["families"] and tensor in self.manifest["families"][family]["tensors"]

    def lefts(self, family: str, tensor: str) -> torch.Tensor:
        """The left factors of a source tensor, fp32 (E, p, r), or (1, p, r) of one that is not fused.

        Raises
        ------
        GlobeError
            If they are damaged.
        """
        name = left_name(tensor, family)
        found = _values(self.tensors, name, self._packing(self.manifest["families"][family]))
        if not found.isfinite().all():
            file = self.tensors[name].file
            raise GlobeError(f"{file}: tensor {name} holds NaN or Inf; compress the source again")
        return found if found.ndim == 3 else found[None]

    @staticmethod
    def _packing(described: dict[str, Any]) -> Packing | None:
        told = described.get("packed")
        return None if told is None else Packing(told["bits"], told["group"])

    def _damaged(self, family: str, part: str, expected: str) -> GlobeError:
        where = self.shards[BANK_FILE].path
        return GlobeError(f"{where}: tensor {bank_name(family, part)} is damaged; expected {expected}: compress again")


def _values(tensors: Mapping[str, TensorInfo], name: str, packing: Packing | None) -> torch.Tensor:
    """The values of a factor, fp32."""
    if packing is None:
        return read_tensor(tensors[name]).float()
    return dequantised(*read_codes(tensors, name, packing))


def is_factored(directory: Path) -> bool:
    """Whether a directory holds a factored checkpoint."""
    return (directory / MANIFEST).exists()


def open_factored(directory: Path) -> Factored:
    """Open a factored directory.

    Raises
    ------
    GlobeError
        If it is not one, is unfinished, was written by a newer format, or a file is missing or truncated.
    """
    directory = Path(directory)
    if not is_factored(directory):
        raise GlobeError(f"{directory}: no {MANIFEST} found; expected a directory written by globe compress")
    if not (directory / "config.json").exists():
        raise GlobeError(f"{directory}: config.json is missing, so the run that wrote it did not finish; run it again")
    manifest = read_json(directory / MANIFEST)
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise GlobeError(
            f"{directory / MANIFEST}: format version {version!r}, this GloBE reads 1 to {FORMAT_VERSION}; update "
            "globe-moe"
        )
    try:
        if version == 1:
            _name_banks(manifest)
        files = [shard["file"] for shard in manifest["source"]["shards"]]
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise GlobeError(f"{directory / MANIFEST}: shard {file!r} is not a safetensors file in the directory")
        names = [*map(shard_name, files), BANK_FILE]
        factored = Factored(directory, manifest, {name: read_header(directory / name) for name in names})
        _check(factored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise GlobeError(f"{directory / MANIFEST}: damaged ({what}); compress the source again") from None
    return factored


def _name_banks(manifest: dict[str, Any]) -> None:
    """Say in a manifest of version 1 what version 2 says: every family has one bank, of its own name."""
    manifest["banks"] = {}
    for name, family in manifest["families"].items():
        manifest["banks"][name] = {key: family[key] for key in ("experts", "rank", "bank")}
        family["banks"] = dict.fromkeys(family["tensors"], name)


def _check(factored: Factored) -> None:
    """Check that the files hold what the manifest promises, so that no export fails half-way or writes nonsense."""
    families, source = factored.manifest["families"], factored.manifest["source"]
    _require(bool(families) and set(families) <= set(FAMILIES), f"families are {list(families)}")
    version = factored.manifest["format_version"]
    _require(version >= CODES_VERSION or not _packs(factored.manifest), f"factors are packed in version {version}")
    single = [shard["file"] for shard in source["shards"]] == ["model.safetensors"]
    metadata = source["index_metadata"]
    _require(isinstance(metadata, dict) or (metadata is None and single), f"index_metadata is {metadata!r}")
    numbers = _check_banks(factored)
    for name, family in families.items():
        count, held = family["experts"], set(family["banks"].values())
        _require(set(family["banks"]) == set(family["tensors"]), f"family {name} has banks for tensors of others")
        _require(
            type(count) is int and sum(map(len, family["tensors"].values())) == count,
            f"family {name} has {count} experts and the tensors of others",
        )
        for tensor, bank in family["banks"].items():
            numbers[bank] += family["tensors"][tensor]
        ranks, size = {factored.manifest["banks"][bank]["rank"] for bank in held}, family["bank"]
        _require({family["rank"]} == ranks, f"family {name} has rank {family['rank']}")
        total = sum(factored.manifest["banks"][bank]["bank"] for bank in held)
        _require(type(size) is int and size == total, f"family {name} has {size} atoms")
        for bank in held:
            described = factored.manifest["banks"][bank]
            shape = described["bank"], described["rank"], family["d"]
            for stored, promised in _as_stored(bank_name(bank, "atoms"), shape, described).items():
                _expect(factored.shards[BANK_FILE], stored, *promised)
    for bank, found in numbers.items():
        count = factored.manifest["banks"][bank]["experts"]
        _require(
            len(found) == count and set(found) == set(range(count)) and all(type(n) is int for n in found),
            f"bank {bank} has {count} experts and the tensors of others",
        )
    missing = {tensor for family in families.values() for tensor in family["tensors"]}
    codes = _check_codes(factored)
    for shard in source["shards"]:
        header = factored.shards[shard_name(shard["file"])]
        _require(all(isinstance(text, str) for text in shard["metadata"].values()), "metadata is not text")
        unnamed = set(header.tensors) - codes
        for tensor, entry in shard["tensors"].items():
            _require(all(type(n) is int for n in entry["shape"]), f"tensor {tensor} has shape {entry['shape']}")
            if "encoded" in entry:
                continue
            for stored, promised in _promised(families, tensor, entry).items():
                _expect(header, stored, *promised)
                unnamed.discard(stored)
            missing.discard(tensor)
        _require(not unnamed, f"it does not name tensor {min(unnamed, default='')} of {header.path.name}")
    _require(not missing, f"no shard has tensor {min(missing, default='')}")


def _packs(manifest: dict[str, Any]) -> bool:
    return any("packed" in told for part in ("families", "banks") for told in manifest[part].values())


def _check_banks(factored: Factored) -> dict[str, list[int]]:
    """Check the tensors of every bank's codes; room for the numbers of its experts, by its name."""
    header, banks = factored.shards[BANK_FILE], factored.manifest["banks"]
    for name, bank in banks.items():
        indices = header.tensors.get(bank_name(name, "codes.indices"))
        nonzeros = indices.shape[0] if indices is not None and indices.shape else 0
        _expect(header, bank_name(name, "codes.indptr"), "I32", (bank["experts"] + 1,))
        _expect(header, bank_name(name, "codes.indices"), "I32", (nonzeros,))
        _expect(header, bank_name(name, "codes.values"), "F32", (nonzeros,))
    return {name: [] for name in banks}


def _check_codes(factored: Factored) -> set[str]:
    """Check the tensors of experts that stay stored as codes; their names."""
    found, parts = factored.tensors, set()
    for shard in factored.manifest["source"]["shards"]:
        for tensor, entry in shard["tensors"].items():
            if "origin" in entry:
                described(tensor, entry)
            if "encoded" not in entry:
                continue
            told = entry["encoded"]["parts"].values()
            for part in told:
                info = found.get(part["tensor"])
                stored = (info.dtype, list(info.shape)) if info is not None else "missing"
                _require(stored == (part["dtype"], part["shape"]), f"tensor {part['tensor']} is {stored}")
            recalled(tensor, entry, found)
            parts |= {part["tensor"] for part in told}
    return parts


def _promised(families: dict[str, Any], tensor: str, entry: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The stored tensors of which a source tensor is made: itself, or left factors and halves left as they were."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    turned, taking_turns = (entry.get(key, False) for key in ("transposed", "interleaved"))
    _require(type(turned) is bool and type(taking_turns) is bool, f"tensor {tensor} lies {turned!r}, {taking_turns!r}")
    held = {name: family for name, family in families.items() if tensor in family["tensors"]}
    if not held:
        return {tensor: (dtype, shape)}
    family = next(iter(held.values()))
    fused = shape[:1] if len(shape) == 3 else ()
    p, d = family["p"], family["d"]
    outputs, inputs = (d, p) if "down" in held else (p, d)
    lies = shape[-1:-3:-1] if turned else shape[-2:]
    together = bool(fused) and "down" not in held and lies == (2 * p, d)
    _require(together or lies == (outputs, inputs), f"tensor {tensor} has shape {list(shape)}")
    _require(len(shape) == len(fused) + 2 and (bool(fused) or not turned), f"tensor {tensor} has shape {list(shape)}")
    _require(together or not taking_turns, f"tensor {tensor} is of one family, and interleaved")
    _require(dtype in ("BF16", "F16", "F32"), f"tensor {tensor} has dtype {dtype}")
    _require(together or len(held) == 1, f"tensor {tensor} is in two families")
    promised: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in FAMILIES:
        if name in held:
            _require(len(held[name]["tensors"][tensor]) == (fused[0] if fused else 1), f"tensor {tensor} has experts")
            promised |= _as_stored(left_name(tensor, name), (*fused, p, held[name]["rank"]), held[name])
        elif together and name != "down":
            promised[rest_name(tensor, name)] = (dtype, (*fused, p, d))
    return promised


def _as_stored(name: str, shape: tuple[int, ...], told: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a factor is stored as, by what the manifest says of it: bf16 unless it is packed."""
    packing = read_packing(told.get("packed"), shape[-1])
    return {name: ("BF16", shape)} if packing is None else packing.entries(name, shape)


def _expect(header: FileHeader, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    info = header.tensors.get(name)
    if info is None or (info.dtype, info.shape) != (dtype, shape):
        found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
        raise GlobeError(
            f"{header.path}: tensor {name} is {found}, {MANIFEST} promises {dtype} {list(shape)}; compress again"
        )


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(found)


def csr_parts(codes: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, torch.Tensor]:
    """Codes (N, m) as the three stored tensors: int32 indptr and indices, fp32 values."""
    matrix = scipy.sparse.csr_array(codes)
    return {
        "codes.indptr": torch.from_numpy(matrix.indptr.astype(np.int32)),
        "codes.indices": torch.from_numpy(matrix.indices.astype(np.int32)),
        "codes.values": torch.from_numpy(matrix.data.astype(np.float32)),
    }
