"""The atoms in use by one right-hand side of nnls, in the order of entry, with their values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from globe.kernels.nnls import NnlsProblem
from globe.kernels.numba.cholesky import backward, extend, forward, gradient

FREE, DEPENDENT, ROUNDING = range(3)  # why an atom may not enter, whatever its gradient

jit = njit(nogil=True, cache=True, error_model="numpy")


class Row(NamedTuple):
    """One right-hand side and the point reached; scalars in arrays of one entry, so that they can change."""

    gram: Any
    shift: float  # added to every entry of the Gram matrix; not 0 on the simplex
    largest: float  # on the diagonal of the Gram matrix
    tolerance: float
    limit: int  # iterations
    c: Any
    w: Any  # gradient, by atom
    bars: Any  # by atom
    atoms: Any  # those in use, in the order of entry
    values: Any  # of those
    minimum: Any
    side: Any
    ones_side: Any
    ones: Any
    factor: Any
    count: Any  # atoms in use
    factored: Any  # of these, covered by the factor
    solved: Any  # of these, covered by the sides
    iterations: Any
    scale: Any  # of c
    multiplier: Any


def new_row(problem: NnlsProblem) -> Row:
    m = len(problem.gram)
    largest = float(problem.gram.diagonal().max())
    # Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant. Adding it leaves the problem as it is and makes G definite wherever
    # the solution is unique. Not a ridge.
    shift = (largest or 1.0) if problem.simplex else 0.0
    constants = (problem.gram, shift, largest, problem.tolerance, problem.max_iterations)
    by_atom = (np.empty(m), np.empty(m), np.zeros(m, np.uint8))
    values, minimum, side, ones_side, ones = np.zeros((5, m + 8))
    by_place = (np.zeros(m + 8, np.int64), values, minimum, side, ones_side, ones, np.zeros((m + 8, m + 8)))
    count, factored, solved, iterations = np.zeros((4, 1), np.int64)
    scale, multiplier = np.zeros((2, 1))
    return Row(*constants, *by_atom, *by_place, count, factored, solved, iterations, scale, multiplier)


@jit
def minimise(s, minimum):  # type: ignore[no-untyped-def]
    """Minimise over the atoms in use without signs; returns their count, or the place of a dependent one."""
    count, c, atoms, factor = s.count[0], s.c, s.atoms, s.factor
    independent = extend(s.gram, s.shift, atoms, count, s.factored[0], factor)
    s.factored[0] = independent
    if independent < count:
        return independent
    known, side, ones_side, ones = s.solved[0], s.side, s.ones_side, s.ones
    for k in range(known, count):
        side[k] = c[atoms[k]]
        ones_side[k] = 1.0
    s.solved[0] = count
    forward(factor, count, known, side)
    backward(factor, count, side, minimum)
    if s.shift > 0.0:
        forward(factor, count, known, ones_side)
        backward(factor, count, ones_side, ones)
        multiplier = (1.0 - minimum[:count].sum()) / ones[:count].sum()
        for k in range(count):
            minimum[k] += multiplier * ones[k]
        s.multiplier[0] = multiplier
    return count


@jit
def find_gradient(s):  # type: ignore[no-untyped-def]
    count = s.count[0]
    constant = (s.multiplier[0] if count else 0.0) - s.shift * s.values[:count].sum()
    gradient(s.gram, s.atoms, count, s.values, s.c, constant, s.w)


@jit
def add(s, atom, value):  # type: ignore[no-untyped-def]
    s.atoms[s.count[0]] = atom
    s.values[s.count[0]] = value
    s.count[0] += 1


@jit
def remove(s, place):  # type: ignore[no-untyped-def]
    for k in range(place, s.count[0] - 1):
        s.atoms[k] = s.atoms[k + 1]
        s.values[k] = s.values[k + 1]
    s.count[0] -= 1
    s.factored[0] = min(s.factored[0], place)
    s.solved[0] = min(s.solved[0], place)


@jit
def keep_positive(s):  # type: ignore[no-untyped-def]
    atoms, values = s.atoms, s.values
    left, kept = 0, s.factored[0]
    for k in range(s.count[0]):
        if values[k] > 0.0:
            atoms[left] = atoms[k]
            values[left] = values[k]
            left += 1
        else:
            kept = min(kept, left)
    s.count[0] = left
    s.factored[0] = min(s.factored[0], kept)
    s.solved[0] = min(s.solved[0], kept)


@jit
def normalise(s):  # type: ignore[no-untyped-def]
    if s.shift > 0.0:
        count = s.count[0]
        s.values[:count] /= s.values[:count].sum()


@jit
def make_feasible(s, vertex):  # type: ignore[no-untyped-def]
    keep_positive(s)
    if s.shift > 0.0 and s.count[0] == 0:
        add(s, vertex, 1.0)
    normalise(s)


@jit
def begin_row(s, correlations, l1):  # type: ignore[no-untyped-def]
    c, gram = s.c, s.gram
    vertex, lowest, scale = 0, np.inf, 0.0
    for j in range(len(c)):
        c[j] = correlations[j] - l1
        scale = max(scale, abs(c[j]))
        value = 0.5 * gram[j, j] - c[j]
        if value < lowest:
            vertex, lowest = j, value
    if s.shift > 0.0:
        scale += s.largest
        c[:] -= c[vertex]  # the multiplier absorbs any constant; taking it out first avoids cancellation
    s.scale[0] = scale
    s.bars[:] = FREE
    s.count[0] = s.factored[0] = s.solved[0] = s.iterations[0] = 0
    s.multiplier[0] = 0.0
    return vertex
