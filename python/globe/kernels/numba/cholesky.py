"""A Cholesky factor that grows with its index set: L Lᵀ = G_PP, reciprocals on the diagonal of L.

Sums may be reordered; the result does not depend on threads, because every row of a problem is one thread's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_EPS = 2.220446049250313e-16
_FAST = {"contract", "reassoc"}


@njit(nogil=True, cache=True, fastmath=_FAST)
def extend(gram, atoms, count, kept, factor):  # type: ignore[no-untyped-def]
    """Append atoms to a factor whose first `kept` are right, in blocks of four rows and eight columns.

    Returns how many atoms come before the first that depends on those before it, to rounding; count if none.
    All arrays have room for eight more entries, which may be read but not used.
    """
    rest = np.empty((4, 8))
    for begin in range(kept, count, 4):
        end = min(begin + 4, count)
        for first in range(0, end, 8):
            _subtract_columns(gram, atoms, begin, first, min(first + 8, end), factor, rest)
            _solve_columns(begin, first, min(first + 8, begin), factor, rest)
            for i in range(max(begin, first), end):
                row, terms = factor[i], rest[i - begin]
                for j in range(max(begin, first), min(first + 8, i + 1)):
                    other = factor[j]
                    value = terms[j - first]
                    for k in range(first, j):
                        value -= row[k] * other[k]
                    if j < i:
                        row[j] = value * other[j]
                    elif value > 4.0 * _EPS * (i + 1) * gram[atoms[i], atoms[i]]:
                        row[i] = 1.0 / math.sqrt(value)
                    else:
                        return i
    return count


@njit(nogil=True, cache=True, fastmath=_FAST)
def _subtract_columns(gram, atoms, begin, first, stop, factor, rest):  # type: ignore[no-untyped-def]
    """rest = the Gram matrix of four rows and the columns [first, stop), less what the columns before explain."""
    r0, r1, r2, r3 = factor[begin], factor[begin + 1], factor[begin + 2], factor[begin + 3]
    g0, g1 = gram[atoms[begin]], gram[atoms[begin + 1]]
    g2, g3 = gram[atoms[begin + 2]], gram[atoms[begin + 3]]
    for j in range(first, stop, 2):
        left, right = factor[j], factor[j + 1]
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = 0.0
        for k in range(first):
            x, y = left[k], right[k]
            s0 += r0[k] * x
            s1 += r1[k] * x
            s2 += r2[k] * x
            s3 += r3[k] * x
            t0 += r0[k] * y
            t1 += r1[k] * y
            t2 += r2[k] * y
            t3 += r3[k] * y
        a, b, place = atoms[j], atoms[j + 1], j - first
        rest[0, place], rest[0, place + 1] = g0[a] - s0, g0[b] - t0
        rest[1, place], rest[1, place + 1] = g1[a] - s1, g1[b] - t1
        rest[2, place], rest[2, place + 1] = g2[a] - s2, g2[b] - t2
        rest[3, place], rest[3, place + 1] = g3[a] - s3, g3[b] - t3


@njit(nogil=True, cache=True, fastmath=_FAST)
def _solve_columns(begin, first, stop, factor, rest):  # type: ignore[no-untyped-def]
    r0, r1, r2, r3 = factor[begin], factor[begin + 1], factor[begin + 2], factor[begin + 3]
    for j in range(first, stop):
        other, place = factor[j], j - first
        v0, v1, v2, v3 = rest[0, place], rest[1, place], rest[2, place], rest[3, place]
        for k in range(first, j):
            u = other[k]
            v0 -= r0[k] * u
            v1 -= r1[k] * u
            v2 -= r2[k] * u
            v3 -= r3[k] * u
        d = other[j]
        r0[j], r1[j], r2[j], r3[j] = v0 * d, v1 * d, v2 * d, v3 * d


@njit(nogil=True, cache=True, fastmath=_FAST)
def forward(factor, count, known, y):  # type: ignore[no-untyped-def]
    """Solve L y = b, where the first `known` entries of y are solved and the others hold b."""
    for i in range(known, count):
        row, solved = factor[i, :i], y[:i]
        total = 0.0
        for k in range(len(row)):
            total += row[k] * solved[k]
        y[i] = (y[i] - total) * factor[i, i]


@njit(nogil=True, cache=True, fastmath=_FAST)
def backward(factor, count, y, x):  # type: ignore[no-untyped-def]
    """Solve Lᵀ x = y; x may be y."""
    for j in range(count):
        x[j] = y[j]
    for i in range(count - 1, -1, -1):
        x[i] *= factor[i, i]
        _subtract(x[:i], x[i], factor[i, :i])


@njit(nogil=True, cache=True, fastmath=_FAST)
def gradient(gram, atoms, count, x, c, multiplier, weights, w):  # type: ignore[no-untyped-def]
    """w = c + multiplier weights - Σ x[k] gram[atoms[k]]"""
    for j in range(len(w)):
        w[j] = c[j] + multiplier * weights[j]
    k = 0
    while k + 8 <= count:
        g0, g1, g2, g3 = gram[atoms[k]], gram[atoms[k + 1]], gram[atoms[k + 2]], gram[atoms[k + 3]]
        g4, g5, g6, g7 = gram[atoms[k + 4]], gram[atoms[k + 5]], gram[atoms[k + 6]], gram[atoms[k + 7]]
        x0, x1, x2, x3, x4, x5, x6, x7 = x[k], x[k + 1], x[k + 2], x[k + 3], x[k + 4], x[k + 5], x[k + 6], x[k + 7]
        for j in range(len(w)):
            first = x0 * g0[j] + x1 * g1[j] + x2 * g2[j] + x3 * g3[j]
            w[j] -= first + (x4 * g4[j] + x5 * g5[j] + x6 * g6[j] + x7 * g7[j])
        k += 8
    while k < count:
        _subtract(w, x[k], gram[atoms[k]])
        k += 1


@njit(nogil=True, cache=True, fastmath=_FAST)
def _subtract(row, weight, other):  # type: ignore[no-untyped-def]
    for j in range(len(row)):
        row[j] -= weight * other[j]
