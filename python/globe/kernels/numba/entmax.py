"""Sparse probabilities, row by row: the algorithm of cpp/src/simd/entmax.hpp, which explains it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from globe.kernels.backends import run_ranges
from globe.kernels.numba.floats import constant
from globe.kernels.numba.power import FORMATS, WORDS, WORK, power

_GENERAL, _ENTMAX15, _SPARSEMAX = 0, 1, 2
_LANES = 64  # running maxima
_PAD = 32  # logits are padded to a multiple, which LLVM needs for whole vectors
_MOST_STEPS = 100  # six are many
_GRAIN = 1 << 15  # numbers that are worth a thread


class _Law(NamedTuple):
    """Shares are max(scale y - tau, 0)^q with q = 1 / (alpha - 1), y = z - max(z)."""

    kind: int
    start: Any  # a threshold below which none can be; thresholds of _GENERAL are tau + 1
    scale: Any
    inverse: Any  # 1 / q
    less_one: Any  # q - 1
    slack: Any  # how far the sum of shares may be above 1 in the end, and at first
    loose: Any


def entmax(z: NDArray[Any], out: NDArray[Any], alpha: float, temperature: float, epsilon: float, threads: int) -> int:
    """Fill out with probabilities. Returns the first row that holds NaN or has no finite maximum, or len(z)."""
    limits, real, kind = np.finfo(z.dtype), z.dtype.type, _kind(alpha)
    start = 0.0 if kind == _GENERAL else -1.0
    scale = min(max((alpha - 1.0) / temperature, float(limits.tiny)), float(limits.max))
    power_less_one = (2.0 - alpha) / (alpha - 1.0)
    law = _Law(kind, *map(real, (start, scale, alpha - 1.0, power_less_one, 4.0 * limits.eps, 1.0)))
    given, bad = constant(z), [len(z)]

    def rows(begin: int, end: int) -> None:
        work = np.empty((WORK + 3, z.shape[1] + _LANES), z.dtype)
        index = np.empty(work.shape[1], np.int64)
        scratch = (work, work.view(WORDS[z.dtype]), index, FORMATS[z.dtype])
        found = begin + _forward(given[begin:end], out[begin:end], law, real(epsilon), *scratch)
        if found < end:
            bad.append(found)

    run_ranges(rows, len(z), threads, max(1, _GRAIN // z.shape[1]))
    return min(bad)


def entmax_backward(
    y: NDArray[Any], dy: NDArray[Any], out: NDArray[Any], alpha: float, temperature: float, threads: int
) -> None:
    """Fill out with the derivative with respect to the logits."""
    real = y.dtype.type
    shares, pull = constant(y), constant(dy)
    inverse = real(min(1.0 / temperature, float(np.finfo(y.dtype).max)))

    def rows(begin: int, end: int) -> None:
        work = np.empty((WORK + 1, y.shape[1]), y.dtype)
        scratch = (work, work.view(WORDS[y.dtype]), FORMATS[y.dtype])
        _backward(
            shares[begin:end], pull[begin:end], out[begin:end], _kind(alpha), real(2.0 - alpha), inverse, *scratch
        )

    run_ranges(rows, len(y), threads, max(1, _GRAIN // max(1, y.shape[1])))


def _kind(alpha: float) -> int:
    return {1.5: _ENTMAX15, 2.0: _SPARSEMAX}.get(alpha, _GENERAL)


@njit(nogil=True, cache=True, error_model="numpy")
def _forward(z, out, law, epsilon, work, words, index, fmt):  # type: ignore[no-untyped-def]
    logits, share, less = work[-3], work[-2], work[-1]
    maxima = np.empty_like(logits[:_LANES])
    infinity = fmt.one / fmt.zero
    for number in range(z.shape[0]):
        row, target = z[number], out[number]
        _find_maxima(row, maxima, infinity)
        top = _largest(maxima, -infinity)
        if not top < infinity or not top > -infinity or _count_nan(row, fmt.zero, fmt.one) > fmt.zero:
            return number
        tau, gather = law.start, False
        if row.size > _LANES:
            # The threshold of some of the logits is a lower bound on that of all.
            for lane in range(_LANES):
                logits[lane] = maxima[lane] - top
            tau, _ = _climb(law, logits, _LANES, tau, law.loose, share, less, work, words, fmt)
            gather = law.kind == _GENERAL  # powers are worth it
        if gather:
            found = _find_candidates(law, row, maxima, top, tau, logits, index, fmt)
        else:
            found = row.size
            for i in range(found):
                logits[i] = row[i] - top
        size = (found + _PAD - 1) // _PAD * _PAD
        for i in range(found, size):
            logits[np.uintp(i)] = -infinity
        tau, total = _climb(law, logits, size, tau, law.slack, share, less, work, words, fmt)
        if gather:
            _shares(law, logits, found, tau, fmt.one / total, share, less, work, words, fmt)
            for i in range(row.size):
                target[i] = fmt.zero
            for i in range(found):
                target[np.uintp(index[i])] = share[i]
        else:
            _shares(law, logits, found, tau, fmt.one / total, target, less, work, words, fmt)
        if epsilon > fmt.zero:
            _prune(target, epsilon, fmt)
    return z.shape[0]


@njit(nogil=True, cache=True, error_model="numpy")
def _find_maxima(row, maxima, infinity):  # type: ignore[no-untyped-def]
    """The largest of every residue of columns modulo _LANES."""
    for lane in range(_LANES):
        maxima[lane] = -infinity
    whole = row.size - row.size % _LANES
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            x = row[np.uintp(start + lane)]  # unsigned: no test for negative indices
            maxima[lane] = x if x > maxima[lane] else maxima[lane]
    for lane in range(row.size - whole):
        x = row[np.uintp(whole + lane)]
        maxima[lane] = x if x > maxima[lane] else maxima[lane]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _largest(values, largest):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        largest = values[i] if values[i] > largest else largest
    return largest


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def _count_nan(row, found, one):  # type: ignore[no-untyped-def]
    zero = found
    for i in range(row.size):
        found += one if row[i] != row[i] else zero
    return found


@njit(nogil=True, cache=True, error_model="numpy")
def _find_candidates(law, row, maxima, top, tau, logits, index, fmt):  # type: ignore[no-untyped-def]
    """The logits, less top, that may have a share at a threshold not below tau, and their columns."""
    least = tau - fmt.one  # thresholds of _GENERAL are tau + 1
    found = 0
    for lane in range(_LANES):
        if (maxima[lane] - top) * law.scale > least:
            for i in range(lane, row.size, _LANES):
                y = row[np.uintp(i)] - top
                logits[np.uintp(found)] = y
                index[np.uintp(found)] = i
                found += y * law.scale > least
    return found


@njit(nogil=True, cache=True, error_model="numpy")
def _climb(law, logits, size, tau, slack, share, less, work, words, fmt):  # type: ignore[no-untyped-def]
    """Newton's method from tau to where the shares sum to at most 1 + slack; returns tau and the sum."""
    total = fmt.one
    for _ in range(_MOST_STEPS):
        if law.kind == _GENERAL:
            _slopes(law, logits, size, tau, share, less, work, words, fmt)
        total, slopes = _sums(law, logits, size, tau, share, work[0], fmt)
        if total <= fmt.one + slack:
            break
        if law.kind == _SPARSEMAX:
            step = total - fmt.one
        elif law.kind == _ENTMAX15:
            step = total - np.sqrt(total)
        else:
            step = -total * np.expm1(-law.inverse * np.log(total))
        above = tau + step / slopes
        if not above > tau:
            break
        tau = above
    return tau, total


# LLVM may add in any order, which is the same for every thread.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _sums(law, logits, size, tau, slope, above, fmt):  # type: ignore[no-untyped-def]
    """Sums of max(u, 0)^q and of max(u, 0)^(q-1); the latter and max(u, 0) are given for _GENERAL."""
    shares, slopes = fmt.zero, fmt.zero
    if law.kind == _SPARSEMAX:
        for i in range(size):
            u = logits[i] * law.scale - tau
            shares += u if u > fmt.zero else fmt.zero
            slopes += fmt.one if u > fmt.zero else fmt.zero
    elif law.kind == _ENTMAX15:
        for i in range(size):
            u = logits[i] * law.scale - tau
            u = u if u > fmt.zero else fmt.zero
            shares += u * u
            slopes += u
    else:
        for i in range(size):
            shares += slope[i] * above[i]
            slopes += slope[i]
    return shares, slopes


@njit(nogil=True, cache=True, error_model="numpy")
def _slopes(law, logits, size, tau, slope, less, work, words, fmt):  # type: ignore[no-untyped-def]
    """less = u - 1 and slope = max(u, 0)^(q-1)."""
    for i in range(size):
        less[i] = logits[i] * law.scale - tau
        less[i] = less[i] if less[i] > -fmt.one else -fmt.one
        work[0, i] = less[i] + fmt.one
    power(law.less_one, less, size, slope, work, words, fmt)


@njit(nogil=True, cache=True, error_model="numpy")
def _shares(law, logits, size, tau, factor, share, less, work, words, fmt):  # type: ignore[no-untyped-def]
    """share = factor max(u, 0)^q."""
    if law.kind == _GENERAL:
        _slopes(law, logits, size, tau, share, less, work, words, fmt)
        for i in range(size):
            share[i] *= work[0, i] * factor
    else:
        for i in range(size):
            u = logits[i] * law.scale - tau
            u = u if u > fmt.zero else fmt.zero
            share[i] = (u if law.kind == _SPARSEMAX else u * u) * factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def _sum(values, total):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        total += values[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _prune(row, epsilon, fmt):  # type: ignore[no-untyped-def]
    """Probabilities below epsilon become 0, but not the largest, and the rest is scaled to sum to 1."""
    cut = min(epsilon, _largest(row, fmt.zero))
    for i in range(row.size):
        row[i] = row[i] if row[i] >= cut else fmt.zero
    factor = fmt.one / _sum(row, fmt.zero)
    for i in range(row.size):
        row[i] *= factor


@njit(nogil=True, cache=True, error_model="numpy")
def _backward(y, dy, out, kind, p, inverse, work, words, fmt):  # type: ignore[no-untyped-def]
    less = product = work[-1]
    size = y.shape[1]
    for number in range(y.shape[0]):
        row, pull, s = y[number], dy[number], out[number]
        if kind == _SPARSEMAX:
            for i in range(size):
                s[i] = fmt.one if row[i] > fmt.zero else fmt.zero
        elif kind == _ENTMAX15:
            for i in range(size):
                s[i] = np.sqrt(row[i]) if row[i] > fmt.zero else fmt.zero
        else:
            for i in range(size):
                less[i] = row[i] - fmt.one
                work[0, i] = row[i]
            power(p, less, size, s, work, words, fmt)
        for i in range(size):
            product[i] = s[i] * pull[i] if s[i] > fmt.zero else fmt.zero
        total = _sum(s, fmt.zero)
        mean = _sum(product, fmt.zero) / total if total > fmt.zero else fmt.zero
        for i in range(size):
            s[i] = s[i] * (pull[i] - mean) * inverse if s[i] > fmt.zero else fmt.zero
