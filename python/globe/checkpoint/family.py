"""Expert matrices W_i (p × d) of one shape: where each lies, and how it is read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.powers import times_power
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorInfo, read_tensor
from globe.errors import GlobeError


@dataclass(frozen=True)
class Expert:
    """One expert matrix W_i: its place in the model, its tensor, and the part of it (fused layouts).

    A family takes it as W_i · 2^-exponent; `read` gives it as stored, or decoded where it is stored as codes. Of a
    tensor with gate and up (`both`) it has every `step`-th output from `first_row` on; `swapped`: outputs are columns.
    `digest` is the CRC-32 of what `read` gave of all its rows in a first pass, once there was one.
    """

    layer: int
    expert: int
    tensor: str
    info: TensorInfo | Encoded
    index: int | None
    first_row: int
    family: str = "gate"
    exponent: int = 0
    both: bool = False
    step: int = 1
    swapped: bool = False
    digest: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """p and d: the expert's width and the model's."""
        rows, columns = self.info.shape[-2:]
        p, d = (columns, rows) if self.transposed else (rows, columns)
        return p // 2 if self.both else p, d

    @property
    def transposed(self) -> bool:
        """Whether W_i is the transpose of what is stored: usually down, whose left factor has the expert's width."""
        return (self.family == "down") != self.swapped

    @property
    def written_transposed(self) -> bool:
        """Whether its stack is [E, inputs, outputs] where it has its values."""
        return self.swapped or (isinstance(self.info, Encoded) and self.info.turned)

    @property
    def stored_bytes(self) -> int:
        """Bytes of W_i in the checkpoint; of one that is stored as codes those of its scales too."""
        if self.index is None:
            return self.info.nbytes
        return self.info.nbytes * math.prod(self.matrix) // math.prod(self.info.shape)

    @property
    def counted(self) -> float:
        """Weights that W_i counts for in a ratio: its own, or where it is stored as codes two bytes as one."""
        return self.stored_bytes / 2 if isinstance(self.info, Encoded) else math.prod(self.matrix)

    def read(self, rows: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows of W_i from the first to before the last, contiguous and in the checkpoint's dtype.

        Of a transposed expert all is read, whatever the rows: they lie scattered.
        """
        if isinstance(self.info, Encoded):
            return self._decode(self.info, rows, out)
        if not self.transposed and self.step == 1:
            first, last = rows
            return read_tensor(self.info, (self.first_row + first, self.first_row + last), self.index, out)
        if not self.transposed:
            return _copied(read_tensor(self.info, self._span(rows), self.index)[:: self.step], out)
        stored = read_tensor(self.info, None, self.index)
        if out is None:
            out = torch.empty(rows[1] - rows[0], len(stored), dtype=stored.dtype)
        if len(out) == stored.shape[1]:
            return out.copy_(stored.T)
        np.copyto(_bits(out), _bits(stored).T[self._places(rows)])  # on this thread; torch would wake its pool
        return out

    def _span(self, rows: tuple[int, int]) -> tuple[int, int]:
        """The first stored output of some rows of W_i, and the one past the last."""
        first, last = (self.first_row + self.step * row for row in rows)
        return (first, last - self.step + 1) if rows[1] > rows[0] else (first, first)

    def _places(self, rows: tuple[int, int]) -> slice:
        return slice(*self._span(rows), self.step)

    def _decode(self, info: Encoded, rows: tuple[int, int], out: torch.Tensor | None) -> torch.Tensor:
        """`read`, a block of the stored rows at a time."""
        if out is None:
            out = torch.empty(rows[1] - rows[0], self.matrix[1], dtype=TORCH_DTYPES[info.dtype])
        bits = _bits(out)
        if self.transposed:
            for first, last, decoded in info.blocks((0, info.shape[-2]), self.index):
                bits[:, first:last] = decoded.T[self._places(rows)]
            return out
        origin, end = self._span(rows)
        for first, _, decoded in info.blocks((origin, end), self.index):
            skipped = (origin - first) % self.step
            place = (first + skipped - origin) // self.step
            taken = decoded[skipped :: self.step]
            bits[place : place + len(taken)] = taken
        return out


def _copied(rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return rows.contiguous()
    np.copyto(_bits(out), _bits(rows))
    return out


@dataclass(frozen=True)
class Family:
    """N expert matrices of one shape p × d in order of layer and expert: all gates, ups or downs, or a pool of them.

    p is the width of the experts and d that of the model: down is taken transposed.
    """

    name: str
    experts: tuple[Expert, ...]
    p: int
    d: int

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def families(self) -> tuple[str, ...]:
        """The families that its experts come from."""
        return tuple(dict.fromkeys(expert.family for expert in self.experts))

    @property
    def layers(self) -> int:
        """The number of layers that hold routed experts."""
        return len({expert.layer for expert in self.experts})

    @property
    def bytes_per_weight(self) -> int:
        """2 for bf16 and fp16, 4 for fp32: in memory."""
        return self.dtype.itemsize

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all its matrices in the checkpoint, each as its tensor is stored."""
        return sum(expert.stored_bytes for expert in self.experts)

    @cached_property
    def counted(self) -> float:
        """Weights that its matrices count for in a ratio."""
        return sum(expert.counted for expert in self.experts)

    def read(self, number: int, rows: tuple[int, int] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read W_i (or its rows from the first to before the last), in the family's dtype, into `out` if given."""
        expert, rows = self.experts[number], rows if rows is not None else (0, self.p)
        if self._as_stored(expert):
            return expert.read(rows, out)
        found = times_power(expert.read(rows).to(self.dtype), -expert.exponent)
        return found if out is None else out.copy_(found)

    def read_digested(self, number: int, out: torch.Tensor) -> int:
        """Read W_i into `out`, and the CRC-32 of its values as they are stored, or decoded."""
        expert, rows = self.experts[number], (0, self.p)
        if self._as_stored(expert):
            return _crc32(expert.read(rows, out))
        found = expert.read(rows)
        out.copy_(times_power(found.to(self.dtype), -expert.exponent))
        return _crc32(found)

    def read_again(self, number: int, out: torch.Tensor) -> None:
        """Read W_i into `out`, which must be what an earlier pass found its `digest` of, if one has.

        Raises
        ------
        GlobeError
            If it is not: the source was changed in between.
        """
        expert, found = self.experts[number], self.read_digested(number, out)
        if expert.digest not in (None, found):
            raise GlobeError(
                f"tensor {expert.tensor} (expert {expert.expert} of layer {expert.layer}, {expert.family}) was changed "
                f"during the run: CRC-32 {found:08x}, expected {expert.digest:08x} as first read; fits may be of "
                "either: see that the source is whole, and start over with --fresh"
            )

    def _as_stored(self, expert: Expert) -> bool:
        return not expert.exponent and TORCH_DTYPES[expert.info.dtype] == self.dtype

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that experts have or are decoded to; fp32 where they have several, or fp16 that is scaled."""
        stored = {expert.info.dtype for expert in self.experts}
        if len(stored) > 1 or (stored == {"F16"} and any(expert.exponent for expert in self.experts)):
            return torch.float32
        return TORCH_DTYPES[stored.pop()]

    def read_some(self, span: slice, out: torch.Tensor) -> torch.Tensor:
        """Read W_i for i in a slice into the first entries of `out` (n, p, d), in the family's dtype."""
        for place in range(span.stop - span.start):
            self.read(span.start + place, out=out[place])
        return out[: span.stop - span.start]

    def batches(self, size: int) -> Iterator[range]:
        """The experts' numbers in runs of at most `size`."""
        for first in range(0, len(self), size):
            yield range(first, min(first + size, len(self)))


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bits(tensor).reshape(-1).view(np.uint8).data)


def _bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers: NumPy has no bf16."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
