"""A Cholesky factor that grows with its index set: L Lᵀ = G_PP + shift, reciprocals on the diagonal of L.

Row i holds zeros right of the diagonal up to a multiple of eight, so that products of rows run over whole
vectors. Sums may be reordered (the result does not depend on threads: every row is worked on by one).
"""

from __future__ import annotations

import math

from numba import njit

_EPS = 2.220446049250313e-16
_FAST = {"contract", "reassoc"}


@njit(nogil=True, cache=True, fastmath=_FAST)
def extend(gram, shift, atoms, count, kept, factor):  # type: ignore[no-untyped-def]
    """Append atoms to a factor whose first `kept` are right.

    Returns how many atoms come before the first that depends on those before it, to rounding; count if none.
    """
    begin = kept
    while begin < count:
        if 4 <= count < begin + 4 and begin + 1 < count:
            begin = count - 4  # four rows once more are faster than two alone
        end = begin + 4 if begin + 4 <= count else begin + 1
        factor[begin:end, : (end + 7) & -8] = 0.0
        done = 0
        if end == begin + 4:
            done = _four_rows(gram, shift, atoms, begin, factor)
        for i in range(begin, end):
            row, entries = factor[i], gram[atoms[i]]
            for j in range(done, i):
                row[j] = (entries[atoms[j]] + shift - _dot(row, factor[j], j)) * factor[j, j]
            size = entries[atoms[i]] + shift
            pivot = size - _dot(row, row, i)
            if not pivot > 4.0 * _EPS * (i + 1) * size:
                return i
            row[i] = 1.0 / math.sqrt(pivot)
        begin = end
    return count


@njit(nogil=True, cache=True, fastmath=_FAST)
def _four_rows(gram, shift, atoms, begin, factor):  # type: ignore[no-untyped-def]
    """Solve for four rows left of column `begin`, two columns at a time; returns the columns solved for."""
    r0, r1, r2, r3 = factor[begin], factor[begin + 1], factor[begin + 2], factor[begin + 3]
    g0, g1 = gram[atoms[begin]], gram[atoms[begin + 1]]
    g2, g3 = gram[atoms[begin + 2]], gram[atoms[begin + 3]]
    for j in range(0, begin - 1, 2):
        left, right = factor[j], factor[j + 1]
        s0, s1, s2, s3, t0, t1, t2, t3 = _eight_dots(r0, r1, r2, r3, left, right, j)
        a, b, d, e, u = atoms[j], atoms[j + 1], left[j], right[j + 1], right[j]
        r0[j] = (g0[a] + shift - s0) * d
        r1[j] = (g1[a] + shift - s1) * d
        r2[j] = (g2[a] + shift - s2) * d
        r3[j] = (g3[a] + shift - s3) * d
        r0[j + 1] = (g0[b] + shift - t0 - u * r0[j]) * e
        r1[j + 1] = (g1[b] + shift - t1 - u * r1[j]) * e
        r2[j + 1] = (g2[b] + shift - t2 - u * r2[j]) * e
        r3[j + 1] = (g3[b] + shift - t3 - u * r3[j]) * e
    return begin // 2 * 2


@njit(nogil=True, cache=True, fastmath=_FAST)
def _eight_dots(r0, r1, r2, r3, left, right, count):  # type: ignore[no-untyped-def]
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = 0.0
    for k in range((count + 7) & -8):
        x, y = left[k], right[k]
        s0 += r0[k] * x
        s1 += r1[k] * x
        s2 += r2[k] * x
        s3 += r3[k] * x
        t0 += r0[k] * y
        t1 += r1[k] * y
        t2 += r2[k] * y
        t3 += r3[k] * y
    return s0, s1, s2, s3, t0, t1, t2, t3


@njit(nogil=True, cache=True, fastmath=_FAST)
def _dot(a, b, count):  # type: ignore[no-untyped-def]
    """Product of the first `count` entries; those after, up to a multiple of eight, must add nothing."""
    total = 0.0
    for k in range((count + 7) & -8):
        total += a[k] * b[k]
    return total


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
def gradient(gram, atoms, count, x, c, constant, w):  # type: ignore[no-untyped-def]
    """w = c + constant - Σ x[k] gram[atoms[k]]"""
    for j in range(len(w)):
        w[j] = c[j] + constant
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
