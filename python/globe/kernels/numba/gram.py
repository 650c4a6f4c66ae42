"""Gram matrices: panels of rows, BLAS products, the lower triangle only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges
from globe.kernels.numba.floats import FLOAT32, bits, widen

_BLOCK = 2048
_PANEL = 128


def add(vectors: NDArray[Any], total: NDArray[np.float64], weights: NDArray[np.float64] | None, threads: int) -> None:
    """The lower triangle of total += X diag(w) Xᵀ; what is above it is left to chance."""
    source, kind = bits(np.ascontiguousarray(vectors))
    roots = np.ones(0, np.float32) if weights is None else np.sqrt(weights).astype(np.float32)
    n, k = source.shape
    part = np.empty((n, min(k, _BLOCK)), np.float32)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block = part[:, : stop - start] if stop - start == part.shape[1] else np.empty((n, stop - start), np.float32)

        def convert(begin: int, end: int, block: Any = block, start: int = start, stop: int = stop) -> None:
            _convert(source, kind, roots[start:stop], start, begin, end, block)

        def multiply(begin: int, end: int, block: Any = block) -> None:
            _multiply(block, begin * _PANEL, min(end * _PANEL, n), total)

        run_ranges(convert, n, threads, grain=16)
        run_ranges(multiply, -(-n // _PANEL), threads)


@njit(nogil=True, cache=True)
def _convert(source, kind, roots, start, begin, end, block):  # type: ignore[no-untyped-def]
    words = np.empty(block.shape[1], np.uint32)
    for row in range(begin, end):
        if kind == FLOAT32:
            block[row] = source[row, start : start + block.shape[1]]
        else:
            widen(source[row, start : start + block.shape[1]], kind, words, block[row])
        if roots.size > 0:
            block[row] *= roots


@njit(nogil=True, cache=True)
def _multiply(block, begin, end, total):  # type: ignore[no-untyped-def]
    for top in range(begin, end, _PANEL):
        bottom = min(top + _PANEL, block.shape[0])
        products = np.dot(block[top:bottom], block[:bottom].T)
        for i in range(bottom - top):
            for j in range(bottom):
                total[top + i, j] += np.float64(products[i, j])
