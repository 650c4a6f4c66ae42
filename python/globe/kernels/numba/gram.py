"""Gram matrices: panels of rows, BLAS products, the lower triangle only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges
from globe.kernels.numba.floats import BFLOAT16, FLOAT32, bits, constant, widen

_BLOCK = 4096
_PANEL = 512


def add(vectors: NDArray[Any], total: NDArray[np.float64], weights: NDArray[np.float64] | None, threads: int) -> None:
    """The lower triangle of total += X diag(w) Xᵀ; what is above it is left to chance."""
    source, kind = bits(constant(np.ascontiguousarray(vectors)))
    roots = np.ones(0, np.float32) if weights is None else np.sqrt(weights).astype(np.float32)
    n, k = source.shape
    panels = -(-n // _PANEL)
    tiles = [(i, j) for i in range(panels) for j in range(i + 1)]
    part = np.empty(n * min(k, _BLOCK), np.float32)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block = part[: n * (stop - start)].reshape(n, stop - start)

        def convert(begin: int, end: int, block: Any = block, start: int = start, stop: int = stop) -> None:
            _convert(source, kind, roots[start:stop], start, begin, end, block, block.view(np.uint32))

        run_ranges(convert, n, threads, grain=16)
        # On the calling thread: BLAS has threads of its own. Of a product with itself NumPy computes half.
        for i, j in tiles:
            rows, cols = (slice(t * _PANEL, min((t + 1) * _PANEL, n)) for t in (i, j))
            _add(total[rows, cols], block[rows] @ block[cols].T)


@njit(nogil=True, cache=True)
def _convert(source, kind, roots, start, begin, end, block, block_words):  # type: ignore[no-untyped-def]
    words = np.empty(block.shape[1], np.uint32)
    for row in range(begin, end):
        entries = source[row, start : start + block.shape[1]]
        if kind == FLOAT32:
            values = block[row]
            for t in range(values.size):
                values[t] = entries[t]
        elif kind == BFLOAT16:
            to = block_words[row]
            for t in range(to.size):
                to[t] = np.uint32(entries[t]) << np.uint32(16)
        else:
            widen(entries, kind, words, block[row])
        if roots.size > 0:
            block[row] *= roots


@njit(nogil=True, cache=True)
def _add(total, products):  # type: ignore[no-untyped-def]
    for i in range(products.shape[0]):
        to, row = total[i], products[i]
        for j in range(row.size):
            to[j] += np.float64(row[j])
