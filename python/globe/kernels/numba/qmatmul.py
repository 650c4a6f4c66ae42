"""Products with weights of few bits, row by row of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges


def qmatmul(x: NDArray[Any], packed: NDArray[np.int32], scales: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    """out = x · Wᵀ, x rounded to 16 bits; sums over groups in float32, in their order."""
    single, scale = np.asarray(x, np.float32), np.asarray(scales, np.float32)
    groups = scales.shape[1]
    whole, steps = np.empty(x.shape, np.int16), np.empty((len(x), groups), np.float32)
    words = packed.view(np.uint32)
    sums = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    _round(single, single.view(np.uint32), whole, steps)
    bits = 32 * words.shape[1] // max(1, x.shape[1])

    def rows(begin: int, end: int) -> None:
        _multiply(whole, steps, words[begin:end], bits, scale[begin:end], sums[:, begin:end])

    run_ranges(rows, len(packed), threads)
    if sums is not out:
        out[...] = sums


@njit(nogil=True, cache=True)
def _round(x, patterns, whole, steps):  # type: ignore[no-untyped-def]
    group = x.shape[1] // max(1, steps.shape[1])
    power = np.empty(1, np.uint32)
    for t in range(x.shape[0]):
        for g in range(steps.shape[1]):
            largest = np.uint32(0)
            for k in range(g * group, (g + 1) * group):
                largest = max(largest, patterns[t, k] & np.uint32(0x7FFFFFFF))
            exponent = max(largest >> np.uint32(23), np.uint32(27))  # biased; 2^114 is enough
            power[0] = np.uint32(268 - exponent) << np.uint32(23)
            factor = power.view(np.float32)[0]
            power[0] = np.uint32(exponent - 14) << np.uint32(23)
            steps[t, g] = power.view(np.float32)[0]
            if exponent == 255:
                factor, steps[t, g] = np.float32(0.0), np.float32(np.nan)
            for k in range(g * group, (g + 1) * group):
                value = x[t, k] * factor if exponent < 255 else np.float32(0.0)
                whole[t, k] = np.int16(min(np.rint(value), np.float32(32767.0)))


@njit(nogil=True, cache=True)
def _multiply(whole, steps, words, bits, scales, sums):  # type: ignore[no-untyped-def]
    count = 32 // max(1, bits)
    groups = steps.shape[1]
    group = whole.shape[1] // max(1, groups)
    row = np.empty(whole.shape[1], np.int16)
    mask, offset = np.uint32((1 << bits) - 1), np.int32(1 << bits >> 1)
    for i in range(words.shape[0]):
        for k in range(words.shape[1]):
            word = words[i, k]
            for p in range(count):
                row[k * count + p] = np.int16(np.int32((word >> np.uint32(bits * p)) & mask) - offset)
        for t in range(whole.shape[0]):
            total = np.float32(0.0)
            for g in range(groups):
                exact = _dot(whole[t, g * group : (g + 1) * group], row[g * group : (g + 1) * group])
                total += np.float32(exact) * (scales[i, g] * steps[t, g])
            sums[t, i] = total


@njit(nogil=True, cache=True, inline="always")
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(a.size):
        total = np.int32(total + np.int32(np.int32(a[k]) * np.int32(b[k])))
    return total
