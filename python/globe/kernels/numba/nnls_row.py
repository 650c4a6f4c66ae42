"""The atoms in use by one right-hand side of nnls, in the order of entry, with their values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from globe.kernels.nnls import NnlsProblem
from globe.kernels.nnls_scale import CONVEX, ScaledGram
from globe.kernels.numba.cholesky import backward, extend, forward, gradient

FREE, DEPENDENT, ROUNDING = range(3)  # why an atom may not enter, whatever its gradient

jit = njit(nogil=True, cache=True, error_model="numpy")


class Row(NamedTuple):
    """One right-hand side in scaled variables and the point reached; scalars that change are arrays of one entry."""

    gram: Any
    lifted: Any  # what is factored
    weights: Any
    inverse_weights: Any
    norms: Any
    factors: Any  # codes in terms of scaled variables
    exponents: Any  # of these
    simplex: bool
    polished: bool
    lift: float
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
    multiplier: Any
    size: Any  # sum of |values| times norms, and on the simplex the size of the multiplier's terms
    concave: Any


def new_row(problem: NnlsProblem, scaled: ScaledGram) -> Row:
    m = len(problem.gram)
    exponents = scaled.exponents - (scaled.unit if problem.simplex else 0)
    constants = (
        *(scaled.gram, scaled.lifted, scaled.weights, 1.0 / scaled.weights, scaled.norms),
        *(np.ldexp(1.0, exponents), exponents, problem.simplex, scaled.polished, scaled.lift),
        *(float(scaled.gram.diagonal().max()), problem.tolerance, problem.max_iterations),
    )
    by_atom = (np.empty(m), np.empty(m), np.zeros(m, np.uint8))
    values, minimum, side, ones_side, ones = np.zeros((5, m + 8))
    by_place = (np.zeros(m + 8, np.int64), values, minimum, side, ones_side, ones, np.zeros((m + 8, m + 8)))
    count, factored, solved, iterations = np.zeros((4, 1), np.int64)
    multiplier, size, concave = np.zeros(1), np.zeros(2), np.zeros(1, np.bool_)
    return Row(*constants, *by_atom, *by_place, count, factored, solved, iterations, multiplier, size, concave)


@jit
def minimise(s, minimum):  # type: ignore[no-untyped-def]
    """Minimise over the atoms in use without signs; returns their count, or the place of a dependent one."""
    count, c, atoms, factor = s.count[0], s.c, s.atoms, s.factor
    independent = extend(s.lifted, atoms, count, s.factored[0], factor)
    s.factored[0] = independent
    if independent < count:
        _examine(s, independent)
        return independent
    known, side = s.solved[0], s.side
    for k in range(known, count):
        side[k] = c[atoms[k]]
        s.ones_side[k] = s.weights[atoms[k]]
    s.solved[0] = count
    forward(factor, count, known, side)
    backward(factor, count, side, minimum)
    if s.simplex:
        _solve_on_simplex(s, minimum, known)
    return count


@jit
def _examine(s, place):  # type: ignore[no-untyped-def]
    """Note where the curvature is negative, at an atom that depends on those before it."""
    atom, known = s.atoms[place], np.empty(place)
    for k in range(place):
        known[k] = s.lifted[atom, s.atoms[k]]
    forward(s.factor, place, 0, known)
    curvature = size = s.lifted[atom, atom]
    for k in range(place):
        curvature -= known[k] * known[k]
    if curvature < (1.0 - CONVEX) * size:
        s.concave[0] = True


@jit
def _solve_on_simplex(s, minimum, known):  # type: ignore[no-untyped-def]
    """From the minimum without the sum to the one with it; where the lift costs digits, refined without it."""
    count, atoms, weights, ones = s.count[0], s.atoms, s.weights, s.ones
    forward(s.factor, count, known, s.ones_side)
    backward(s.factor, count, s.ones_side, ones)
    most, total = 0.0, 0.0
    for k in range(count):
        most += weights[atoms[k]] * minimum[k]
        total += weights[atoms[k]] * ones[k]
    shift = (1.0 - most) / total
    for k in range(count):
        minimum[k] += shift * ones[k]
    s.multiplier[0] = shift - s.lift
    if not s.polished:
        return
    rest = np.empty(count)
    for _ in range(2):
        short, most = 1.0, 0.0
        for k in range(count):
            rest[k] = s.c[atoms[k]] + s.multiplier[0] * weights[atoms[k]]
            for i in range(count):
                rest[k] -= s.gram[atoms[k], atoms[i]] * minimum[i]
            short -= weights[atoms[k]] * minimum[k]
        forward(s.factor, count, 0, rest)
        backward(s.factor, count, rest, rest)
        for k in range(count):
            most += weights[atoms[k]] * rest[k]
        shift = (short - most) / total
        for k in range(count):
            minimum[k] += rest[k] + shift * ones[k]
        s.multiplier[0] += shift - s.lift * short


@jit
def find_gradient(s):  # type: ignore[no-untyped-def]
    """The gradient, and the sizes it is relative to."""
    count, atoms, values, size, own = s.count[0], s.atoms, s.values, 0.0, 0.0
    for k in range(count):
        size += s.norms[atoms[k]] * abs(values[k])
        own += abs(s.c[atoms[k]] * values[k])
    s.size[0], s.size[1] = size, own + size * size if s.simplex else 0.0
    multiplier = s.multiplier[0] if count else 0.0
    gradient(s.gram, atoms, count, values, s.c, multiplier, s.weights, s.w)


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
    if s.simplex:
        count, total = s.count[0], 0.0
        for k in range(count):
            total += s.weights[s.atoms[k]] * s.values[k]
        s.values[:count] /= total


@jit
def make_feasible(s, vertex):  # type: ignore[no-untyped-def]
    keep_positive(s)
    if s.simplex and s.count[0] == 0:
        add(s, vertex, s.inverse_weights[vertex])
    normalise(s)


@jit
def begin_row(s, side):  # type: ignore[no-untyped-def]
    s.c[:] = side
    s.bars[:] = FREE
    s.count[0] = s.factored[0] = s.solved[0] = s.iterations[0] = 0
    s.multiplier[0] = 0.0
    s.concave[0] = False
