"""Scales: read in fp32, and refused where they would make a matrix of nonsense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from globe.checkpoint.formats.arrays import Array, Floats, floats, read_array
from globe.checkpoint.formats.scheme import REMEDY
from globe.checkpoint.tensorfile import TensorInfo
from globe.errors import GlobeError

_LIMIT = {"BF16": 2.0**127 * (2 - 2.0**-7), "F16": 65504.0}


@dataclass(frozen=True)
class Part:
    """One of the tensors that a matrix is stored as."""

    tensor: str
    info: TensorInfo


def read_scales(part: Part, grid: tuple[int, int], rows: tuple[int, int], index: int | None) -> Floats:
    """Scales of some rows of a grid, (rows, columns of the grid) in fp32; all exist and are above zero.

    Zero is let through where scales are F8_E4M3, whose range ends so early that a group of tiny weights has it.

    Raises
    ------
    GlobeError
        If one is NaN, infinite, negative or zero.
    """
    stacked = index is not None and len(part.info.shape) > 0 and part.info.shape != (1,)
    inner = part.info.shape[1:] if stacked else part.info.shape
    whole = grid[0] == 1 or len(inner) < 2
    stored = read_array(part.info, None if whole else rows, index if stacked else None)
    found = floats(stored, part.info.dtype).reshape(-1, grid[1])
    found = found[slice(*rows)] if whole else found
    below = (found >= 0) & ~np.signbit(found) if part.info.dtype == "F8_E4M3" else found > 0
    _require(part, found, below & np.isfinite(found), rows[0], "scales above 0 and finite")
    return found


def require_range(part: Part, scales: Floats, first: int, largest: float, dtype: str) -> None:
    """Refuse scales that take the largest code beyond what a dtype holds.

    Raises
    ------
    GlobeError
        If one does.
    """
    fine = scales.astype(np.float64) * largest <= _LIMIT[dtype]
    _require(part, scales, fine, first, f"scales with which codes up to {largest:g} stay within {dtype}")


def _require(part: Part, found: Floats, fine: Array, first: int, expected: str) -> None:
    if fine.all():
        return
    row, column = (int(place[0]) for place in np.nonzero(~fine))
    value = found[row, column]
    told = f"{value:g}"
    if part.info.dtype in ("U8", "F8_E8M0"):
        told = f"e8m0 exponent {255 if np.isnan(value) else int(np.log2(value)) + 127} ({value:g})"
    raise GlobeError(
        f"tensor {part.tensor} holds {told} in row {first + row}, column {column}; expected {expected}: fetch the "
        f"checkpoint again, or {REMEDY}"
    )
