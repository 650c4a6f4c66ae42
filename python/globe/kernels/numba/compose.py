"""Sparse mixtures, tile by tile."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges
from globe.kernels.numba.floats import BFLOAT16, FLOAT32, bits, constant, narrow_bfloat16, round_bfloat16, widen

_TILE = 1024
_HALF = 1024  # 32-bit words of a row's tile where two bfloat16 lie in each
_TILE_BYTES = 512 * 1024  # of atoms: they stay in a core's second-level cache
_LONG = 1 << 30  # products in one call of a compiled function: some tenths of a second
_RANGES = 64  # fixed, so that sums over ranges of columns do not depend on the number of threads


def compose(codes: Any, bank: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    """out = codes · bank, summed in float32 in the order of the stored entries."""
    atoms, kind = bits(constant(bank))
    # float16 is rounded by NumPy; Numba has no such conversion.
    sums = out if out.dtype != np.float16 else np.empty(out.shape, np.float32)
    target, out_kind = bits(sums)

    used = np.unique(codes.indices)
    slots = np.zeros(len(bank), np.int64)
    slots[used] = np.arange(len(used))
    pairs = kind == out_kind == BFLOAT16
    width, longest = (2, 2 * _HALF) if pairs else (4, _TILE)
    tile = int(np.clip(_TILE_BYTES // (width * max(1, len(used))) // 64 * 64, 64, longest))

    for first, last in _row_blocks(codes.indptr, _LONG // tile):

        def tiles(begin: int, end: int, first: int = first, last: int = last) -> None:
            problem = (codes.indptr[first : last + 1], codes.indices, codes.data, used, slots, atoms)
            if pairs:
                _compose_pairs(*problem, target[first:last], tile, begin * tile, end * tile)
            else:
                _compose(*problem, kind, target[first:last], out_kind, tile, begin * tile, end * tile)

        run_ranges(tiles, -(-bank.shape[1] // tile), threads)
    if sums is not out:
        out[...] = sums


def code_gradient(codes: Any, gradient: NDArray[Any], bank: NDArray[Any], threads: int) -> NDArray[np.float64]:
    """⟨gradient[i], bank[j]⟩ for every stored entry (i, j) of codes."""
    rows, row_kind = bits(constant(gradient))
    atoms, kind = bits(constant(bank))
    tiles = -(-bank.shape[1] // _TILE)
    ranges = max(1, min(_RANGES, tiles))
    partial = np.zeros((ranges, codes.nnz))

    for top, bottom in _row_blocks(codes.indptr, _LONG // _TILE):
        entries = int(codes.indptr[bottom] - codes.indptr[top])
        step = max(1, _LONG // (_TILE * max(1, entries)))
        for offset in range(0, -(-tiles // ranges), step):

            def some(
                begin: int, end: int, top: int = top, bottom: int = bottom, offset: int = offset, step: int = step
            ) -> None:
                block = (codes.indptr[top : bottom + 1], codes.indices, rows[top:bottom], row_kind, atoms, kind)
                for part in range(begin, end):
                    first, last = part * tiles // ranges, (part + 1) * tiles // ranges
                    places = (first + offset) * _TILE, min(first + offset + step, last) * _TILE
                    _code_gradient(*block, *places, partial[part])

            run_ranges(some, ranges, threads)
    result: NDArray[np.float64] = partial.sum(axis=0)
    return result


def _row_blocks(indptr: NDArray[Any], entries: int) -> list[tuple[int, int]]:
    """Ranges of rows with about so many stored entries each."""
    count = max(1, min(len(indptr) - 1, int(indptr[-1]) // max(1, entries)))
    cuts = np.searchsorted(indptr, np.linspace(0, indptr[-1], count + 1)[1:-1]).tolist()
    bounds = [0, *cuts, len(indptr) - 1]
    return list(pairwise(bounds))


@njit(nogil=True, cache=True)
def _compose(indptr, indices, values, used, slots, bank, kind, out, out_kind, tile, begin, end):  # type: ignore[no-untyped-def]
    words = np.empty(tile, np.uint32)
    sums = np.empty(tile, np.float32)
    atoms = np.empty((used.size, tile), np.float32)
    for offset in range(begin, min(end, bank.shape[1]), tile):
        stop = min(offset + tile, bank.shape[1])
        width = stop - offset
        for slot in range(used.size):
            if kind == FLOAT32:
                atoms[slot, :width] = bank[used[slot], offset:stop]
            else:
                widen(bank[used[slot], offset:stop], kind, words[:width], atoms[slot, :width])
        for row in range(indptr.size - 1):
            sums[:] = 0.0
            k, last = indptr[row], indptr[row + 1]
            while k + 4 <= last:  # four terms a pass, added one after the other
                a, b = atoms[slots[indices[k]]], atoms[slots[indices[k + 1]]]
                c, d = atoms[slots[indices[k + 2]]], atoms[slots[indices[k + 3]]]
                wa, wb, wc, wd = values[k], values[k + 1], values[k + 2], values[k + 3]
                for t in range(tile):
                    sums[t] = (((sums[t] + wa * a[t]) + wb * b[t]) + wc * c[t]) + wd * d[t]
                k += 4
            while k < last:
                a, wa = atoms[slots[indices[k]]], values[k]
                for t in range(tile):
                    sums[t] += wa * a[t]
                k += 1
            if out_kind == BFLOAT16:
                narrow_bfloat16(sums[:width], words[:width], out[row, offset:stop])
            else:
                for t in range(width):
                    out[row, offset + t] = sums[t]


@njit(nogil=True, cache=True)
def _compose_pairs(indptr, indices, values, used, slots, bank, out, tile, begin, end):  # type: ignore[no-untyped-def]
    """From bfloat16 to bfloat16, two columns at once in the halves of a word."""
    half = tile // 2
    entries = np.zeros((used.size, tile), np.uint16)
    atoms = entries.view(np.uint32)
    sums = np.empty(2 * _HALF, np.float32)
    line = np.empty(tile, np.uint16)
    words = line.view(np.uint32)
    for offset in range(begin, min(end, bank.shape[1]), tile):
        stop = min(offset + tile, bank.shape[1])
        for slot in range(used.size):
            _copy(entries[slot, : stop - offset], bank[used[slot], offset:stop])
        for row in range(indptr.size - 1):
            sums[:] = 0.0
            k, last = indptr[row], indptr[row + 1]
            while k + 4 <= last:
                a, b = atoms[slots[indices[k]]], atoms[slots[indices[k + 1]]]
                c, d = atoms[slots[indices[k + 2]]], atoms[slots[indices[k + 3]]]
                _add_four(sums, half, a, b, c, d, values[k], values[k + 1], values[k + 2], values[k + 3])
                k += 4
            while k < last:
                _add_one(sums, half, atoms[slots[indices[k]]], values[k])
                k += 1
            for t in range(half):
                low, high = round_bfloat16(sums[t]), round_bfloat16(sums[_HALF + t])
                words[t] = (low >> np.uint32(16)) | (high & np.uint32(0xFFFF0000))
            _copy(out[row, offset:stop], line[: stop - offset])


@njit(nogil=True, cache=True)
def _copy(to, source):  # type: ignore[no-untyped-def]
    for t in range(to.size):  # LLVM copies whole vectors here, but not where slices are assigned
        to[t] = source[t]


@njit(nogil=True, cache=True, inline="always")
def _low(word):  # type: ignore[no-untyped-def]
    return np.uint32(word << np.uint32(16)).view(np.float32)


@njit(nogil=True, cache=True, inline="always")
def _high(word):  # type: ignore[no-untyped-def]
    return np.uint32(word & np.uint32(0xFFFF0000)).view(np.float32)


@njit(nogil=True, cache=True, fastmath={"contract"})
def _add_four(sums, half, a, b, c, d, wa, wb, wc, wd):  # type: ignore[no-untyped-def]
    """Four terms a pass, added one after the other."""
    for t in range(half):
        p, q, r, s = a[t], b[t], c[t], d[t]
        sums[t] = (((sums[t] + wa * _low(p)) + wb * _low(q)) + wc * _low(r)) + wd * _low(s)
        high = ((sums[_HALF + t] + wa * _high(p)) + wb * _high(q)) + wc * _high(r)
        sums[_HALF + t] = high + wd * _high(s)


@njit(nogil=True, cache=True, fastmath={"contract"})
def _add_one(sums, half, a, wa):  # type: ignore[no-untyped-def]
    for t in range(half):
        p = a[t]
        sums[t] += wa * _low(p)
        sums[_HALF + t] += wa * _high(p)


@njit(nogil=True, cache=True)
def _code_gradient(indptr, indices, rows, row_kind, bank, kind, begin, end, products):  # type: ignore[no-untyped-def]
    words = np.empty(_TILE, np.uint32)
    row_tile = np.empty(_TILE, np.float32)
    atom = np.empty(_TILE, np.float32)
    for offset in range(begin, min(end, bank.shape[1]), _TILE):
        stop = min(offset + _TILE, bank.shape[1])
        width = stop - offset
        for row in range(indptr.size - 1):
            if row_kind == FLOAT32:
                row_tile[:width] = rows[row, offset:stop]
            else:
                widen(rows[row, offset:stop], row_kind, words[:width], row_tile[:width])
            for k in range(indptr[row], indptr[row + 1]):
                if kind == FLOAT32:
                    atom[:width] = bank[indices[k], offset:stop]
                else:
                    widen(bank[indices[k], offset:stop], kind, words[:width], atom[:width])
                products[k] += np.float64(np.dot(row_tile[:width], atom[:width]))
