"""bfloat16 and float16 as bits, inside Numba functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


def bits(array: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The array as Numba can take it (16-bit types as uint16), and the number of its dtype."""
    if array.dtype == np.float32:
        return array, FLOAT32
    return array.view(np.uint16), FLOAT16 if array.dtype == np.float16 else BFLOAT16


def constant(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written to: Numba compiles a function once more for each argument that can or cannot."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(nogil=True, cache=True, inline="always")
def widen(row, kind, words, out):  # type: ignore[no-untyped-def]
    """out = row in float32; words is uint32 scratch of the same length."""
    if kind == BFLOAT16:
        for t in range(out.size):
            words[t] = np.uint32(row[t]) << np.uint32(16)
        out[:] = words.view(np.float32)
    else:
        for t in range(out.size):
            bit = np.uint32(row[t])
            words[t] = (bit & np.uint32(0x7FFF)) << np.uint32(13)
        values = words.view(np.float32)
        for t in range(out.size):
            out[t] = values[t] * np.float32(2.0**112)  # corrects the exponent; subnormals come out right
        words[:] = out.view(np.uint32)
        for t in range(out.size):
            bit = np.uint32(row[t])
            if bit & np.uint32(0x7FFF) >= np.uint32(0x7C00):
                words[t] |= np.uint32(0x7F800000)
            words[t] |= (bit & np.uint32(0x8000)) << np.uint32(16)
        out[:] = words.view(np.float32)


@njit(nogil=True, cache=True, inline="always")
def narrow_bfloat16(values, words, out):  # type: ignore[no-untyped-def]
    """out = values rounded to bfloat16 bits, to nearest, ties to even."""
    words[:] = values.view(np.uint32)
    for t in range(out.size):
        word = words[t]
        rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[t] = np.uint16((word >> np.uint32(16)) | np.uint32(0x40)) if nan else np.uint16(rounded)


@njit(nogil=True, cache=True, inline="always")
def round_bfloat16(value):  # type: ignore[no-untyped-def]
    """The bits of a float32, of which the upper half is the value rounded to bfloat16."""
    word = np.float32(value).view(np.uint32)
    rounded = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
    nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint32(word | np.uint32(0x400000)) if nan else np.uint32(rounded)
