"""Experts' matrices that stay in their files: mapped into memory, with the system's page cache as the store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorInfo, read_tensor
from globe.errors import UsageError

DISK = "disk"


class Matrices(tuple[torch.Tensor, ...]):
    """A matrix of each of a layer's experts in the dtype of its file, read from disk when it is touched."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Matrices:
        return self  # nobody writes to them, and a copy would be of the whole files


class Files:
    """Maps tensors of files, each file once, for reading.

    Pages are shared with every process that maps the file, and the system takes them back where memory is short.
    """

    def __init__(self) -> None:
        self._bytes: dict[Path, torch.Tensor] = {}

    def map(self, info: TensorInfo) -> torch.Tensor:
        """A tensor of a file, not read yet; it is read now where it does not lie at a multiple of its elements."""
        dtype = TORCH_DTYPES[info.dtype]
        if info.start % dtype.itemsize:
            return read_tensor(info)
        if info.file not in self._bytes:
            self._bytes[info.file] = torch.from_file(
                str(info.file), shared=False, size=info.file.stat().st_size, dtype=torch.uint8
            )
        return self._bytes[info.file][info.start : info.start + info.nbytes].view(dtype).view(info.shape)


def stored_lefts(stored: Mapping[str, TensorInfo], layer: int, held: str) -> list[TensorInfo]:
    """The tensors of a layer's parameter `held`: a stack, or one of each expert in their order."""
    ours = re.compile(rf"(?:^|\.)layers\.{layer}\..*\.(?:globe_)?{held}$")
    return [stored[name] for name in sorted(filter(ours.search, stored), key=_natural)]


def stored_matrices(stored: Mapping[str, TensorInfo], layer: int, source: str) -> list[TensorInfo]:
    """The tensors of a layer's experts that a pattern of transformers merges, in the order of the experts' numbers.

    The pattern has a star where the number of the expert is.
    """
    before, star, after = source.replace("\\", "").rstrip("$").rpartition("*")
    if not star or not before.endswith("experts."):
        return []
    theirs = re.compile(rf"(?:^|\.)layers\.{layer}\.(?:.*\.)?experts\.\d+{re.escape(after)}$")
    return [stored[name] for name in sorted(filter(theirs.search, stored), key=_natural)]


def map_matrices(files: Files, found: list[TensorInfo]) -> Matrices:
    """The matrices of a layer's experts, of one stack or of a tensor for each."""
    tensors = [files.map(info) for info in found]
    return Matrices(tensors[0].unbind() if tensors[0].ndim == 3 else tensors)


def require_offload(offload: str | None, device: str | torch.device, options: Mapping[str, Any]) -> None:
    """Refuse an offload that does not exist, and what it does not go with.

    Raises
    ------
    UsageError
    """
    if offload not in (None, DISK):
        raise UsageError(f"offload is {offload!r}; expected None or {DISK!r}")
    if offload is None:
        return
    if torch.device(device).type != "cpu":
        raise UsageError(f"offload maps left factors into the host's memory, and device is {device}; expected cpu")
    for name in ("device_map", "config"):
        if options.get(name) is not None:
            raise UsageError(f"offload goes without {name}; leave out one of them")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
