"""Parts of tensors as NumPy arrays, and the numbers that codes stand for, in fp32.

NumPy works on the thread that calls it; torch would wake its pool for every expert.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.tensorfile import TensorInfo, read_bytes

Array = NDArray[Any]
Floats = NDArray[np.float32]

# Bytes in a file as integers or floats that NumPy has.
_STORED: dict[str, Any] = {
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": "<i4",
    "I64": "<i8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
}
LARGEST = {"e4m3": 448.0, "e2m1": 6.0, "int8": 128.0, "packed4": 15.0, "packed8": 255.0}  # of a code
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_array(info: TensorInfo, rows: tuple[int, int] | None = None, index: int | None = None) -> Array:
    """Read a tensor, entry `index` of its first axis, or the `rows` of what that leaves, as they are stored."""
    kind = np.dtype(_STORED[info.dtype])
    shape, offset = info.shape, 0
    if index is not None:
        shape = shape[1:]
        offset = index * math.prod(shape) * kind.itemsize
    if rows is not None:
        offset += rows[0] * math.prod(shape[1:]) * kind.itemsize
        shape = (rows[1] - rows[0], *shape[1:])
    return np.frombuffer(read_bytes(info, offset, math.prod(shape) * kind.itemsize), kind).reshape(shape)


def floats(stored: Array, dtype: str) -> Floats:
    """Stored numbers in fp32, exactly: floats, or e8m0 exponents as powers of two (NaN for 255)."""
    if dtype == "F8_E4M3":
        return _e4m3()[stored]
    if dtype in ("F8_E8M0", "U8"):
        powers = np.ldexp(np.float32(1), np.minimum(stored, 254).astype(np.int32) - 127)
        return np.where(stored == 255, np.float32(np.nan), powers)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def numbers(stored: Array, codes: str, columns: int) -> Floats:
    """The numbers (rows, columns) that rows of codes stand for, without their scales."""
    if codes == "e4m3":
        return _e4m3()[stored]
    if codes == "e2m1":
        return _e2m1_pairs()[stored].reshape(len(stored), columns)
    if codes == "int8":
        return stored.astype(np.float32)
    return unpacked(stored, codes, columns).astype(np.float32)


def unpacked(stored: Array, codes: str, columns: int) -> NDArray[np.int16]:
    """Integers (rows, columns) of 4 or 8 bits out of words of 32, the lowest first; they are stored without sign."""
    octets = np.ascontiguousarray(stored).view(np.uint8)
    if codes == "packed8":
        return octets[:, :columns].astype(np.int16) - 128
    halves = np.stack((octets & 15, octets >> 4), -1).reshape(len(octets), -1)
    return halves[:, :columns].astype(np.int16) - 8


def rounded(values: Floats, dtype: str) -> Array:
    """Values in fp32, which are lost, as the bits of BF16 or F16, rounded to the nearest (ties to even)."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.int16)
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    bits += odd
    bits += 0x7FFF
    bits >>= 16
    return bits.astype(np.uint16).view(np.int16)


@lru_cache
def _e4m3() -> Floats:
    """What each byte is as F8_E4M3."""
    table: Floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    return table


@lru_cache
def _e2m1_pairs() -> Floats:
    """The two numbers of each byte, (256, 2), the low nibble first."""
    one = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
    octets = np.arange(256)
    return np.stack((one[octets & 15], one[octets >> 4]), -1)
