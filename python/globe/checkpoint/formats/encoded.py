"""A matrix, or a stack of them, that is stored as codes with scales, decoded a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from globe.checkpoint.formats.arrays import LARGEST, Array, Floats, numbers, read_array, rounded, unpacked
from globe.checkpoint.formats.scales import Part, read_scales, require_range
from globe.checkpoint.formats.scheme import REMEDY, Scheme
from globe.checkpoint.tensorfile import TensorInfo
from globe.errors import GlobeError

_VALUES = 1 << 19  # decoded at a time
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Encoded:
    """What is read in place of a tensor that has its values themselves: W = (q - z) · s in fp32, rounded once.

    Parameters
    ----------
    name : str
        The tensor's, as it would be called with its values.
    scheme : Scheme
    parts : mapping of str to Part
        ``codes``, ``scale``; where there are some ``zero_point``, ``global_scale`` (which divides scales) and
        ``shape``; and tensors that tell of what the matrix is multiplied by, which nothing here needs.
    shape : tuple of int
        Decoded: (p, d), or (E, p, d).
    dtype : str
        What it is rounded to: BF16, and F16 where the scales are.
    turned : bool
        Whether a tensor of its values is the transpose: [E, inputs, outputs].
    """

    name: str
    scheme: Scheme
    parts: Mapping[str, Part]
    shape: tuple[int, ...]
    dtype: str
    turned: bool = False

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Of a tensor of its values."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.turned else self.shape

    @cached_property
    def nbytes(self) -> int:
        """Bytes as stored, of all parts."""
        return sum(part.info.nbytes for part in self.parts.values())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        return grid_of(self.scheme, self.shape)

    def read(self, rows: tuple[int, int] | None = None, index: int | None = None) -> torch.Tensor:
        """Rows of a matrix (all), or of entry `index` of a stack; without an index all of a stack.

        Raises
        ------
        GlobeError
            If a scale is NaN, infinite, not above zero or too large, or a file ended early.
        """
        if index is None and len(self.shape) == 3:
            return torch.stack([self.read(rows, number) for number in range(self.shape[0])])
        first, last = rows or (0, self.shape[-2])
        out = torch.empty(last - first, self.shape[-1], dtype=_TORCH[self.dtype])
        bits = out.view(torch.int16).numpy()
        for start, stop, decoded in self.blocks((first, last), index):
            bits[start - first : stop - first] = decoded
        return out

    def blocks(self, rows: tuple[int, int], index: int | None) -> Iterator[tuple[int, int, Array]]:
        """Blocks of rows: the first, the one past the last, and the bits of their values (rows, d)."""
        self._require_shape(index)
        columns = self.shape[-1]
        step = max(1, _VALUES // max(1, columns))
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            scales, shifts, places = self._scales((first, last), index)
            values = numbers(self._codes((first, last), index), self.scheme.codes, columns)
            if shifts is not None:
                values -= self._wide(shifts[places])
            _multiply(values, scales[places], self.scheme.block[1] or columns)
            yield first, last, rounded(values, self.dtype)

    def _codes(self, rows: tuple[int, int], index: int | None) -> Array:
        stored = read_array(self.parts["codes"].info, rows, index)
        return stored.reshape(len(stored), -1)

    def _scales(self, rows: tuple[int, int], index: int | None) -> tuple[Floats, Floats | None, Array]:
        """Scales and zero points of the rows of the grid that some rows need, and which of them each row has."""
        height = self.scheme.block[0] or self.shape[-2]
        span = rows[0] // height, -(-rows[1] // height)
        part, overall = self.parts["scale"], self.parts.get("global_scale")
        scales = read_scales(part, self.grid, span, index)
        if overall is not None:
            scales = scales / read_scales(overall, (1, 1), (0, 1), index)
        require_range(part, scales, span[0], LARGEST[self.scheme.codes], self.dtype)
        places = np.arange(*rows) // height - span[0]
        return scales, self._zero_points(span, index), places

    def _zero_points(self, span: tuple[int, int], index: int | None) -> Floats | None:
        part = self.parts.get("zero_point")
        if part is None:
            return None
        stored = read_array(part.info, None, index if len(part.info.shape) == 3 else None)
        if part.info.dtype == "I32":  # packed as the codes are, along the rows
            stored = unpacked(stored.T, self.scheme.codes, self.grid[0]).T
        return stored.reshape(self.grid)[slice(*span)].astype(np.float32)

    def _wide(self, grid: Floats) -> Floats:
        """Rows of the grid with a value for each column."""
        columns = self.shape[-1]
        return np.repeat(grid, self.scheme.block[1] or columns, axis=1)[:, :columns]

    def _require_shape(self, index: int | None) -> None:
        """Refuse a stored shape that is another than the codes have room for."""
        part = self.parts.get("shape")
        if part is None:
            return
        stated = read_array(part.info, None, index if len(part.info.shape) == 2 else None).tolist()
        if stated != list(self.shape[-2:]):
            codes = self.parts["codes"]
            raise GlobeError(
                f"tensor {part.tensor} holds {stated}, and {codes.tensor} {list(codes.info.shape)} has codes for "
                f"{list(self.shape[-2:])}; expected equal ones: fetch the checkpoint again, or {REMEDY}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which `recalled` makes it again where its tensors lie."""
        return {
            "scheme": asdict(self.scheme),
            "parts": {
                role: {"tensor": part.tensor, "dtype": part.info.dtype, "shape": list(part.info.shape)}
                for role, part in self.parts.items()
            },
        }


def stored_as(info: TensorInfo | Encoded) -> str:
    """The dtype of a tensor, or what its codes are."""
    return info.scheme.text if isinstance(info, Encoded) else info.dtype


def grid_of(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the scales of one matrix of a shape."""
    (p, d), (rows, columns) = shape[-2:], scheme.block
    return -(-p // rows) if rows else 1, -(-d // columns) if columns else 1


def _multiply(values: Floats, scales: Floats, width: int) -> None:
    """Multiply rows of values by their scales (rows, columns of the grid), `width` columns at a time."""
    rows, columns = values.shape
    whole = columns // width * width
    blocks = values[:, :whole] if whole < columns else values
    blocks = np.lib.stride_tricks.as_strided(
        blocks, (rows, whole // width, width), (values.strides[0], width * values.itemsize, values.itemsize)
    )
    blocks *= scales[:, : whole // width, None]
    if whole < columns:
        values[:, whole:] *= scales[:, -1:]
