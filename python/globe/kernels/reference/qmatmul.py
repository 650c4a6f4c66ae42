"""Products with weights of few bits: integers by float64 products, which are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def qmatmul(x: NDArray[Any], packed: NDArray[np.int32], scales: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    """out = x · Wᵀ, x rounded to 16 bits; sums over groups in float32, in their order."""
    groups = scales.shape[1]
    whole, steps = rounded(x.astype(np.float32), groups)
    weights = unpack(packed, x.shape[1]).reshape(len(packed), *whole.shape[1:])
    sums = np.zeros(out.shape, np.float32)
    for g in range(groups):
        exact = whole[:, g].astype(np.float64) @ weights[:, g].T.astype(np.float64)
        sums += exact.astype(np.float32) * (scales[:, g].astype(np.float32) * steps[:, g, None])
    out[...] = sums


def rounded(x: NDArray[np.float32], groups: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Integers (n, groups, size) of 16 bits and steps (n, groups), x ≈ integers · steps; NaN where x is not finite."""
    parts = x.reshape(len(x), groups, x.shape[1] // max(1, groups))
    largest = np.abs(parts).max(axis=2, initial=0.0)
    finite = np.isfinite(largest)
    exponent = np.maximum(np.frexp(np.where(finite, largest, 0.0))[1] - 1, -100)
    scaled = np.ldexp(np.where(finite[:, :, None], parts, 0.0), 14 - exponent[:, :, None])
    steps = np.where(finite, np.ldexp(np.float32(1.0), exponent - 14), np.float32(np.nan))
    return np.minimum(np.rint(scaled), 32767).astype(np.int32), steps


def unpack(packed: NDArray[np.int32], columns: int) -> NDArray[np.int32]:
    """The integers of packed words, which hold them in offset binary, low bits first."""
    bits = 32 * packed.shape[1] // max(1, columns)
    shifts = np.arange(32 // bits if bits else 0, dtype=np.uint32) * np.uint32(bits)
    unsigned = (packed.view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    result: NDArray[np.int32] = unsigned.reshape(len(packed), columns).astype(np.int32) - (1 << bits >> 1)
    return result
