"""The factored checkpoint: names, files, and reading back B̃ and W̃ from OUT alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from globe.errors import GlobeError
from globe.gemm import mixtures
from globe.tensorfile import FileHeader, read_header, read_tensor

FORMAT_VERSION = 1
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
    """The tensor of a left factor A_i ([p, r], or [E, p, r] for a fused source tensor)."""
    return f"{tensor}.globe_{family}_left"


def rest_name(tensor: str, family: str) -> str:
    """The tensor of the half of a fused source tensor that is not compressed ([E, p, d])."""
    return f"{tensor}.globe_{family}_dense"


def bank_name(family: str, part: str) -> str:
    """A tensor in the bank's file; `part` is atoms, codes.indptr, codes.indices or codes.values."""
    return f"globe.{family}.{part}"


@dataclass(frozen=True)
class Bank:
    """A family's stored atoms (m, r, d), fp32 in memory, and codes (N, m)."""

    atoms: torch.Tensor
    codes: scipy.sparse.csr_array

    def mixture(self, number: int) -> torch.Tensor:
        """B̃_i, (r, d) in fp32."""
        row = self.codes[[number]].toarray()
        return mixtures(row, self.atoms)[0]


@dataclass(frozen=True)
class Factored:
    """An opened factored directory: its manifest (globe.json) and the headers of its files."""

    directory: Path
    manifest: dict[str, Any]
    shards: dict[str, FileHeader]

    def bank(self, family: str) -> Bank:
        """Read a family's atoms and codes."""
        tensors = self.shards[BANK_FILE].tensors
        atoms, indptr, indices, values = (
            read_tensor(tensors[bank_name(family, part)])
            for part in ("atoms", "codes.indptr", "codes.indices", "codes.values")
        )
        shape = (len(indptr) - 1, len(atoms))
        codes = scipy.sparse.csr_array((values.numpy(), indices.numpy(), indptr.numpy()), shape=shape)
        return Bank(atoms.float(), codes)


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
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise GlobeError(f"{directory / MANIFEST}: not a manifest of a factored checkpoint") from None
    if version != FORMAT_VERSION:
        raise GlobeError(f"{directory}: format version {version}, this GloBE reads {FORMAT_VERSION}; update globe-moe")
    names = [shard_name(shard["file"]) for shard in manifest["source"]["shards"]] + [BANK_FILE]
    return Factored(directory, manifest, {name: read_header(directory / name) for name in names})


def csr_parts(codes: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, torch.Tensor]:
    """Codes (N, m) as the three stored tensors: int32 indptr and indices, fp32 values."""
    matrix = scipy.sparse.csr_array(codes)
    return {
        "codes.indptr": torch.from_numpy(matrix.indptr.astype(np.int32)),
        "codes.indices": torch.from_numpy(matrix.indices.astype(np.int32)),
        "codes.values": torch.from_numpy(matrix.data.astype(np.float32)),
    }
