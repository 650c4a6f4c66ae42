"""Routed experts of an export in the source's own fp8: codes and scales made anew of the reconstructed values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.tensors import described
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorWriter
from globe.errors import UsageError

_LARGEST = 448.0  # of F8_E4M3
_MADE = {"codes", "scale"}


def require_fp8(source: Path, record: dict[str, Any]) -> None:
    """Refuse an export in the source's format where that is not fp8 of scales alone.

    Raises
    ------
    UsageError
        If the experts were values, other codes, or need more than scales.
    """
    entries = {name: entry for shard in record["shards"] for name, entry in shard["tensors"].items()}
    matrices = [described(name, entry) for name, entry in entries.items() if "origin" in entry]
    if not matrices:
        raise UsageError(f"{source}: the source stores compressed experts as values; leave out --as-source")
    for matrix in matrices:
        if matrix.scheme.codes != "e4m3":
            raise UsageError(f"{source}: the source stores {matrix.scheme.text}, --as-source writes fp8; leave it out")
        more = sorted(matrix.parts.keys() - _MADE)
        if more:
            name = matrix.parts[more[0]].tensor
            raise UsageError(
                f"{source}: the source has {name}, which is not kept of compressed experts: leave out --as-source"
            )


def as_stored(name: str, entry: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors, dtypes and shapes in which the source has a matrix of codes."""
    return {part.tensor: (part.info.dtype, part.info.shape) for part in described(name, entry).parts.values()}


def write_requantised(writer: TensorWriter, matrix: Encoded, experts: Iterable[torch.Tensor]) -> None:
    """Write codes and scales of the experts (p, d) of a tensor, one after the other, by the names that the source has.

    Parameters
    ----------
    writer : TensorWriter
        Where both are next.
    matrix : Encoded
        How the source had them.
    experts : iterable of torch.Tensor
        One, or all of a stack.
    """
    codes, scale = matrix.parts["codes"], matrix.parts["scale"]
    scales: list[torch.Tensor] = []

    def each() -> Iterator[torch.Tensor]:
        for values in experts:
            made, theirs = requantised(matrix, values)
            scales.append(theirs)
            yield made

    writer.write_parts(codes.tensor, each())
    writer.write(scale.tensor, torch.stack(scales).reshape(scale.info.shape))


def requantised(matrix: Encoded, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (p, d) and scales, a row of them for each row of blocks; a block's largest value takes the largest code.

    Parameters
    ----------
    matrix : Encoded
        How the source had it, or the stack that it is of.
    values : torch.Tensor, shape (p, d)
    """
    scale = matrix.parts["scale"]
    rows, columns = (block or size for block, size in zip(matrix.scheme.block, values.shape, strict=True))
    (p, d), (down, across) = values.shape, matrix.grid
    padded = torch.zeros(down * rows, across * columns)
    padded[:p, :d] = values
    blocks = padded.view(down, rows, across, columns)
    peaks = blocks.abs().amax((1, 3))
    wanted = torch.where(peaks > 0, peaks / _LARGEST, 1.0)
    if scale.info.dtype in ("U8", "F8_E8M0"):
        exponents = wanted.log2().ceil().clamp(-126, 119)
        scales, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
    else:
        kind = TORCH_DTYPES[scale.info.dtype]
        stored = wanted.to(kind).clamp(min=torch.finfo(kind).tiny * torch.finfo(kind).eps)  # what it has above zero
        scales = stored.float()
    made = (blocks / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST).view_as(padded)[:p, :d]
    return made.to(torch.float8_e4m3fn), stored
