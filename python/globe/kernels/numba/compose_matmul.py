"""Products with sparse mixtures: a row of a mixture at a time, then its products with all of its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges
from globe.kernels.numba.floats import FLOAT32, bits, constant, widen


def compose_matmul(
    codes: Any, bank: NDArray[Any], x: NDArray[Any], rows: NDArray[np.int64], out: NDArray[Any], threads: int
) -> None:
    """out[t] = (Σ_j codes[rows[t], j] · bank[j]) x[t], in float32."""
    atoms, kind = bits(constant(bank))
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1, append=-1))
    tokens = x[order].astype(np.float32)
    sums = np.empty(out.shape, np.float32)

    def some(begin: int, end: int) -> None:
        problem = (codes.indptr, codes.indices, codes.data, atoms, kind)
        _multiply(*problem, rows[order], starts, tokens, order, begin, end, sums)

    run_ranges(some, bank.shape[1], threads)
    out[...] = sums


@njit(nogil=True, cache=True)
def _multiply(indptr, indices, values, bank, kind, rows, starts, x, order, begin, end, out):  # type: ignore[no-untyped-def]
    words = np.empty(x.shape[1], np.uint32)
    atom, mixture = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for i in range(begin, end):
        for segment in range(starts.size - 1):
            row = rows[starts[segment]]
            mixture[:] = 0.0
            for k in range(indptr[row], indptr[row + 1]):
                if kind == FLOAT32:
                    atom[:] = bank[indices[k], i]
                else:
                    widen(bank[indices[k], i], kind, words, atom)
                for t in range(mixture.size):
                    mixture[t] += values[k] * atom[t]
            for t in range(starts[segment], starts[segment + 1]):
                out[order[t], i] = _dot(mixture, x[t])


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for t in range(a.size):
        total += a[t] * b[t]
    return total
