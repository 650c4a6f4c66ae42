"""Non-negative least squares from a Gram matrix, row by row, in the steps of cpp/src/nnls_solver.cpp."""

from __future__ import annotations

import math

import numpy as np

from globe.kernels.backends import run_ranges
from globe.kernels.nnls import NnlsProblem, NnlsResult
from globe.kernels.nnls_scale import scale, scale_rows
from globe.kernels.numba.cholesky import backward, forward
from globe.kernels.numba.nnls_row import (
    DEPENDENT,
    FREE,
    ROUNDING,
    add,
    begin_row,
    find_gradient,
    jit,
    keep_positive,
    make_feasible,
    minimise,
    new_row,
    normalise,
    remove,
)

_EPS = 2.220446049250313e-16
_TINY = 2.2250738585072014e-308
_FIRST_BLOCK = 8  # atoms that may enter an empty support together
_PATIENCE = 8  # exchanges without progress before atoms move one at a time
_MOST = float(np.finfo(np.float64).max)
_OPTIMAL, _SINGULAR, _NOT_CONVERGED, _SUPPORT_LIMIT, _INDEFINITE, _OVERFLOW = range(6)


def solve(problem: NnlsProblem, result: NnlsResult, threads: int) -> None:
    """Fill in the result."""
    nobody = np.zeros((0, len(problem.gram)), np.bool_)
    guesses = nobody if problem.warm_start is None or problem.max_support > 0 else problem.warm_start
    scaled = scale(problem.gram, problem.simplex)
    outputs = (result.codes, result.status, result.iterations, result.kkt_residual, result.scaled_residual)

    def rows(begin: int, end: int) -> None:
        given = scale_rows(scaled, problem.correlations[begin:end], problem.l1)
        sides = (given.sides, given.exponents, given.sizes, given.vertices, given.overflows)
        some = tuple(output[begin:end] for output in outputs)
        row = new_row(problem, scaled)
        _solve_rows(row, sides, problem.max_support, guesses[begin:end], scaled.indefinite, some)

    run_ranges(rows, len(problem.correlations), threads)


@jit
def _solve_rows(s, sides, max_support, warm, indefinite, outputs):  # type: ignore[no-untyped-def]
    sides, exponents, sizes, vertices, overflows = sides
    codes, status, iterations, residuals, scaled_residuals = outputs
    for row in range(len(sides)):
        begin_row(s, sides[row])
        vertex, overflow, bounded = vertices[row], overflows[row], False
        if len(warm):
            for j in range(len(s.c)):
                if warm[row, j]:
                    add(s, j, 0.0)
        if s.simplex and s.count[0] == 0:
            add(s, vertex, s.inverse_weights[vertex])
        if max_support > 0 or not _exchange_blocks(s):
            bounded = _move_single_atoms(s, max_support, vertex)
        make_feasible(s, vertex)
        residuals[row], scaled_residuals[row] = _residuals(s, bounded, sizes[row])
        for k in range(s.count[0]):
            atom, value = s.atoms[k], s.values[k]
            code = value * s.factors[atom] if exponents[row] == 0 else _scale(value, s.exponents[atom] + exponents[row])
            overflow |= code > _MOST
            codes[row, atom] = min(code, _MOST)
        iterations[row] = s.iterations[0]
        within = residuals[row] <= s.tolerance and scaled_residuals[row] <= s.tolerance
        status[row] = _status(s, overflow, indefinite, within, bounded)


@jit
def _scale(value, exponent):  # type: ignore[no-untyped-def]
    """math.ldexp, which raises an error where this is infinite; rounded once, where the result is a denormal."""
    if exponent > 2100:
        return np.inf
    if exponent > 1000:
        return value * 2.0 ** (exponent - 1400) * 2.0**700 * 2.0**700
    return math.ldexp(value, exponent)


@jit
def _status(s, overflow, indefinite, within, bounded):  # type: ignore[no-untyped-def]
    if overflow:
        return _OVERFLOW
    if indefinite or s.concave[0]:
        return _INDEFINITE
    if not within:
        return _NOT_CONVERGED
    if bounded:
        return _SUPPORT_LIMIT
    for bar in s.bars:
        if bar == DEPENDENT:
            return _SINGULAR
    return _OPTIMAL


@jit
def _exchange_blocks(s):  # type: ignore[no-untyped-def]
    """Exchange all infeasible atoms at once (Kim and Park 2011, section 3.2); False where that makes no progress.

    The support may at most double, so that the factor grows with it from nothing.
    """
    w, values, candidates = s.w, s.values, np.empty(len(s.c), np.int64)
    fewest, patience = len(w) + 1, _PATIENCE
    while True:
        while s.count[0] > 0:
            if s.iterations[0] == s.limit:
                return False
            place = minimise(s, s.values)
            if place == s.count[0]:
                s.iterations[0] += 1
                break
            remove(s, place)
        if s.simplex and s.count[0] == 0:
            return False
        half, by_norm, by_weight = _entering_gradient(s)
        entering, size = 0, s.size[0]
        for j in range(len(w)):
            candidates[entering] = j
            entering += w[j] > half * abs(s.c[j]) + by_norm * s.norms[j] + by_weight * s.weights[j]
        leaving = 0
        for k in range(s.count[0]):
            leaving += values[k] < -_EPS * size
        if leaving + entering == 0:
            return True
        if leaving + entering < fewest:
            fewest, patience = leaving + entering, _PATIENCE
        elif patience == 0:
            return False
        else:
            patience -= 1
        if leaving > 0:
            for k in range(s.count[0]):
                values[k] = 0.0 if values[k] < -_EPS * size else max(values[k], _TINY)
            keep_positive(s)
        _enter_steepest(s, candidates[:entering], max(s.count[0], _FIRST_BLOCK))


@jit
def _enter_steepest(s, candidates, most):  # type: ignore[no-untyped-def]
    w = s.w
    least, ties = 0.0, len(candidates)  # ties to accept at the least gradient itself
    if len(candidates) > most:
        steepness = s.minimum[: len(candidates)]
        for i in range(len(candidates)):
            steepness[i] = w[candidates[i]]
        least, ties = _nth_largest(steepness, most), most
        for value in steepness:
            ties -= value > least
    for atom in candidates:
        if w[atom] > least or (w[atom] == least and ties > 0):
            ties -= w[atom] == least
            add(s, atom, 0.0)


@jit
def _nth_largest(values, n):  # type: ignore[no-untyped-def]
    """Hoare's selection; np.partition allocates, which takes longer for so few. Reorders the values."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i, j = i + 1, j - 1
        if n - 1 > j and n - 1 < i:
            break
        low, high = (low, j) if n - 1 <= j else (i, high)
    return values[n - 1]


@jit
def _move_single_atoms(s, max_support, vertex):  # type: ignore[no-untyped-def]
    """Lawson and Hanson (1974, chapter 23); True where max_support kept an atom out."""
    if max_support == 0:
        make_feasible(s, vertex)
    while _settle(s):
        half, by_norm, by_weight = _entering_gradient(s)
        best, steepest = -1, 0.0
        for j in range(len(s.c)):
            least = half * abs(s.c[j]) + by_norm * s.norms[j] + by_weight * s.weights[j]
            if s.w[j] > least and s.bars[j] == FREE:
                norm = s.norms[j]
                steepness = s.w[j] / norm if norm > 0.0 else np.inf
                if steepness > steepest:
                    best, steepest = j, steepness
        if best < 0:
            return False
        if 0 < max_support <= s.count[0]:
            return True
        add(s, best, 0.0)
    return False


@jit
def _settle(s):  # type: ignore[no-untyped-def]
    """Walk to the minimum over the atoms in use, dropping those that reach zero; False at the limit."""
    while s.count[0] > 0:
        if s.iterations[0] == s.limit:
            return False
        place = minimise(s, s.minimum)
        newest = s.count[0] - 1
        if place <= newest:
            atom, entering = s.atoms[place], s.values[place] == 0.0
            remove(s, place)
            normalise(s)
            if entering:
                _exchange_dependent(s, atom)
            continue
        s.iterations[0] += 1
        if s.values[newest] == 0.0 and s.minimum[newest] <= 0.0:
            s.bars[s.atoms[newest]] = ROUNDING
            remove(s, newest)
            continue
        step = np.inf
        for k in range(newest + 1):
            if s.minimum[k] <= 0.0:
                step = min(step, s.values[k] / (s.values[k] - s.minimum[k]))
        if step == np.inf:
            s.values[: newest + 1] = s.minimum[: newest + 1]
            return True
        for k in range(newest + 1):
            start, end = s.values[k], s.minimum[k]
            stops = end <= 0.0 and start / (start - end) <= step
            s.values[k] = 0.0 if stops else start + step * (end - start)
        keep_positive(s)
        s.bars[:] = FREE
    return True


@jit
def _exchange_dependent(s, atom):  # type: ignore[no-untyped-def]
    """Let an atom enter that is a combination of those in use.

    Along that combination the objective falls on a straight line until an atom in use leaves; if none ever
    does, there is no minimum.
    """
    count = s.count[0]
    if minimise(s, s.minimum) < count:
        return
    for k in range(count):
        s.minimum[k] = s.lifted[atom, s.atoms[k]]
    forward(s.factor, count, 0, s.minimum)
    backward(s.factor, count, s.minimum, s.minimum)
    size, step = 0.0, np.inf
    for k in range(count):
        size = max(size, abs(s.minimum[k]))
    least = np.sqrt(_EPS) * size
    for k in range(count):
        if s.minimum[k] > least:
            step = min(step, s.values[k] / s.minimum[k])
    if step == np.inf:
        s.bars[atom] = DEPENDENT
        return
    for k in range(count):
        leaves = s.minimum[k] > least and s.values[k] / s.minimum[k] <= step
        s.values[k] = 0.0 if leaves else s.values[k] - step * s.minimum[k]
    keep_positive(s)
    add(s, atom, step)
    normalise(s)
    s.bars[:] = FREE


@jit
def _entering_gradient(s):  # type: ignore[no-untyped-def]
    """Find the gradient, zero at the atoms in use; what the least at which one enters is made of."""
    find_gradient(s)
    for k in range(s.count[0]):
        s.w[s.atoms[k]] = 0.0
    half = 0.5 * s.tolerance
    return half, half * s.size[0], half * s.size[1]


@jit
def _residuals(s, bounded, size):  # type: ignore[no-untyped-def]
    """kkt_residual and scaled_residual of NnlsResult."""
    find_gradient(s)
    count, atoms, values, w, bars, weights = s.count[0], s.atoms, s.values, s.w, s.bars, s.weights
    multiplier, total, worst, scaled = 0.0, 0.0, 0.0, 0.0
    for k in range(count):
        total += weights[atoms[k]] * values[k]
        multiplier += w[atoms[k]] * values[k]
    if s.simplex:
        for j in range(len(w)):
            w[j] -= multiplier * weights[j]
    for k in range(count):
        w[atoms[k]] = abs(w[atoms[k]])
    used = np.zeros(len(w), np.bool_)
    used[atoms[:count]] = True
    for j in range(len(w)):
        if not w[j] <= 0.0 and (used[j] or not (bounded or bars[j] == DEPENDENT)):
            worst = max(worst, w[j] * s.inverse_weights[j])
            terms = abs(s.c[j]) + s.norms[j] * s.size[0] + weights[j] * s.size[1]
            if not w[j] <= scaled * terms:
                scaled = w[j] / terms
    return worst / (size + s.largest * total) if worst > 0.0 else 0.0, scaled
