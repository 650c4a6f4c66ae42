"""Expert matrices W_i (p × d) of one shape: where each lies, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.powers import times_power
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorInfo, read_tensor


@dataclass(frozen=True)
class Expert:
    """One expert matrix W_i: its place in the model, its tensor, and the part of it (fused layouts).

    A family takes it as W_i · 2^-exponent; `read` gives it as stored.
    """

    layer: int
    expert: int
    tensor: str
    info: TensorInfo
    index: int | None
    first_row: int
    family: str = "gate"
    exponent: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """p and d: the expert's width and the model's."""
        rows, columns = self.info.shape[-2:]
        if self.transposed:
            return columns, rows
        return (rows if self.index is None else rows // 2), columns

    @property
    def transposed(self) -> bool:
        """Whether W_i is the transpose of what is stored: down, whose left factor then has the expert's width."""
        return self.family == "down"

    def read(self, rows: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows of W_i from the first to before the last, contiguous and in the checkpoint's dtype.

        Of a transposed expert all is read, whatever the rows: they lie scattered.
        """
        if not self.transposed:
            first, last = rows
            return read_tensor(self.info, (self.first_row + first, self.first_row + last), self.index, out)
        stored = read_tensor(self.info, None, self.index)
        if out is None:
            out = torch.empty(rows[1] - rows[0], len(stored), dtype=stored.dtype)
        if len(out) == stored.shape[1]:
            return out.copy_(stored.T)
        np.copyto(_bits(out), _bits(stored).T[slice(*rows)])  # on this thread; torch would wake its pool
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

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its matrices in the checkpoint, each in its tensor's own dtype."""
        return sum(self.p * self.d * TORCH_DTYPES[expert.info.dtype].itemsize for expert in self.experts)

    def read(self, number: int, rows: tuple[int, int] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read W_i (or its rows from the first to before the last), in the family's dtype, into `out` if given."""
        expert, rows = self.experts[number], rows if rows is not None else (0, self.p)
        if not expert.exponent and TORCH_DTYPES[expert.info.dtype] == self.dtype:
            return expert.read(rows, out)
        found = times_power(expert.read(rows).to(self.dtype), -expert.exponent)
        return found if out is None else out.copy_(found)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The checkpoint's dtype of the experts; fp32 where they have several, or fp16 that is scaled."""
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


def _bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers: NumPy has no bf16."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
