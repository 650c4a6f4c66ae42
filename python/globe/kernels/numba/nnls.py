"""Non-negative least squares from a Gram matrix, row by row, in the steps of cpp/src/nnls_solver.cpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from globe.kernels.backends import run_ranges
from globe.kernels.nnls import NnlsProblem, NnlsResult
from globe.kernels.numba.cholesky import backward, extend, forward, gradient

_EPS = 2.220446049250313e-16
_TINY = 2.2250738585072014e-308
_FIRST_BLOCK = 8  # atoms that may enter an empty support together
_PATIENCE = 8  # exchanges without progress before atoms move one at a time
_OPTIMAL, _SINGULAR, _NOT_CONVERGED, _SUPPORT_LIMIT = range(4)
_FREE, _DEPENDENT, _ROUNDING = range(3)  # why an atom may not enter, whatever its gradient

_jit = njit(nogil=True, cache=True, error_model="numpy")


class _Row(NamedTuple):
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


def solve(problem: NnlsProblem, result: NnlsResult, threads: int) -> None:
    """Fill in the result."""
    largest = float(problem.gram.diagonal().max())
    # Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant. Adding it leaves the problem as it is and makes G definite wherever
    # the solution is unique. Not a ridge.
    shift = (largest or 1.0) if problem.simplex else 0.0
    m = len(problem.gram)
    warm = np.zeros((0, m), np.bool_) if problem.warm_start is None else problem.warm_start

    def rows(begin: int, end: int) -> None:
        c, w = np.empty(m), np.empty(m)
        values, minimum, side, ones_side, ones = np.zeros((5, m + 8))
        count, factored, solved, iterations = np.zeros((4, 1), np.int64)
        scale, multiplier = np.zeros((2, 1))
        options = (problem.gram, shift, largest, problem.tolerance, problem.max_iterations)
        atoms, factor = np.zeros(m + 8, np.int64), np.zeros((m + 8, m + 8))
        places = (atoms, values, minimum, side, ones_side, ones, factor)
        scalars = (count, factored, solved, iterations, scale, multiplier)
        row = _Row(*options, c, w, np.zeros(m, np.uint8), *places, *scalars)
        outputs = (result.codes, result.status, result.iterations, result.kkt_residual)
        _solve_rows(row, problem.correlations, problem.l1, problem.max_support, warm, *outputs, begin, end)

    run_ranges(rows, len(problem.correlations), threads)


@_jit
def _solve_rows(s, correlations, l1, max_support, warm, codes, status, iterations, residuals, begin, end):  # type: ignore[no-untyped-def]
    for row in range(begin, end):
        vertex = _begin(s, correlations[row], l1)
        if len(warm) and max_support == 0:
            for j in range(len(s.c)):
                if warm[row, j]:
                    _add(s, j, 0.0)
        if s.shift > 0.0 and s.count[0] == 0:
            _add(s, vertex, 1.0)
        bounded = False
        if max_support > 0 or not _exchange_blocks(s):
            bounded = _move_single_atoms(s, max_support, vertex)
        _make_feasible(s, vertex)
        residual = _kkt_residual(s, bounded)
        atoms, values = s.atoms, s.values
        for k in range(s.count[0]):
            codes[row, atoms[k]] = values[k]
        residuals[row] = residual
        iterations[row] = s.iterations[0]
        if not residual <= s.tolerance:
            status[row] = _NOT_CONVERGED
        elif bounded:
            status[row] = _SUPPORT_LIMIT
        else:
            status[row] = _OPTIMAL
            for bar in s.bars:
                if bar == _DEPENDENT:
                    status[row] = _SINGULAR


@_jit
def _begin(s, correlations, l1):  # type: ignore[no-untyped-def]
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
    s.bars[:] = _FREE
    s.count[0] = s.factored[0] = s.solved[0] = s.iterations[0] = 0
    s.multiplier[0] = 0.0
    return vertex


@_jit
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
            place = _minimise(s, s.values)
            if place == s.count[0]:
                s.iterations[0] += 1
                break
            _remove(s, place)
        if s.shift > 0.0 and s.count[0] == 0:
            return False
        least, size = _find_gradient(s)
        entering = 0
        for j in range(len(w)):
            candidates[entering] = j
            entering += w[j] > least
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
            _keep_positive(s)
        _enter_steepest(s, candidates[:entering], max(s.count[0], _FIRST_BLOCK))


@_jit
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
            _add(s, atom, 0.0)


@_jit
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


@_jit
def _move_single_atoms(s, max_support, vertex):  # type: ignore[no-untyped-def]
    """Lawson and Hanson (1974, chapter 23); True where max_support kept an atom out."""
    if max_support == 0:
        _make_feasible(s, vertex)
    while _settle(s):
        least, _ = _find_gradient(s)
        best, steepest = -1, 0.0
        for j in range(len(s.c)):
            if s.w[j] > least and s.bars[j] == _FREE:
                norm = np.sqrt(s.gram[j, j])
                steepness = s.w[j] / norm if norm > 0.0 else np.inf
                if steepness > steepest:
                    best, steepest = j, steepness
        if best < 0:
            return False
        if 0 < max_support <= s.count[0]:
            return True
        _add(s, best, 0.0)
    return False


@_jit
def _settle(s):  # type: ignore[no-untyped-def]
    """Walk to the minimum over the atoms in use, dropping those that reach zero; False at the limit."""
    while s.count[0] > 0:
        if s.iterations[0] == s.limit:
            return False
        place = _minimise(s, s.minimum)
        newest = s.count[0] - 1
        if place <= newest:
            atom, entering = s.atoms[place], s.values[place] == 0.0
            _remove(s, place)
            _normalise(s)
            if entering:
                _exchange_dependent(s, atom)
            continue
        s.iterations[0] += 1
        if s.values[newest] == 0.0 and s.minimum[newest] <= 0.0:
            s.bars[s.atoms[newest]] = _ROUNDING
            _remove(s, newest)
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
        _keep_positive(s)
        s.bars[:] = _FREE
    return True


@_jit
def _exchange_dependent(s, atom):  # type: ignore[no-untyped-def]
    """Let an atom enter that is a combination of those in use.

    Along that combination the objective falls on a straight line until an atom in use leaves; if none ever
    does, there is no minimum.
    """
    count = s.count[0]
    if _minimise(s, s.minimum) < count:
        return
    for k in range(count):
        s.minimum[k] = s.gram[atom, s.atoms[k]] + s.shift
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
        s.bars[atom] = _DEPENDENT
        return
    for k in range(count):
        leaves = s.minimum[k] > least and s.values[k] / s.minimum[k] <= step
        s.values[k] = 0.0 if leaves else s.values[k] - step * s.minimum[k]
    _keep_positive(s)
    _add(s, atom, step)
    _normalise(s)
    s.bars[:] = _FREE


@_jit
def _minimise(s, minimum):  # type: ignore[no-untyped-def]
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


@_jit
def _find_gradient(s):  # type: ignore[no-untyped-def]
    """The gradient, zero at the atoms in use; the least at which an atom enters; the sum of |values|."""
    count, atoms, values, w = s.count[0], s.atoms, s.values, s.w
    _gradient(s)
    size = 0.0
    for k in range(count):
        size += abs(values[k])
        w[atoms[k]] = 0.0
    return 0.5 * s.tolerance * (s.scale[0] + s.largest * size), size


@_jit
def _gradient(s):  # type: ignore[no-untyped-def]
    count = s.count[0]
    constant = (s.multiplier[0] if count else 0.0) - s.shift * s.values[:count].sum()
    gradient(s.gram, s.atoms, count, s.values, s.c, constant, s.w)


@_jit
def _add(s, atom, value):  # type: ignore[no-untyped-def]
    s.atoms[s.count[0]] = atom
    s.values[s.count[0]] = value
    s.count[0] += 1


@_jit
def _remove(s, place):  # type: ignore[no-untyped-def]
    for k in range(place, s.count[0] - 1):
        s.atoms[k] = s.atoms[k + 1]
        s.values[k] = s.values[k + 1]
    s.count[0] -= 1
    s.factored[0] = min(s.factored[0], place)
    s.solved[0] = min(s.solved[0], place)


@_jit
def _keep_positive(s):  # type: ignore[no-untyped-def]
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


@_jit
def _normalise(s):  # type: ignore[no-untyped-def]
    if s.shift > 0.0:
        count = s.count[0]
        s.values[:count] /= s.values[:count].sum()


@_jit
def _make_feasible(s, vertex):  # type: ignore[no-untyped-def]
    _keep_positive(s)
    if s.shift > 0.0 and s.count[0] == 0:
        _add(s, vertex, 1.0)
    _normalise(s)


@_jit
def _kkt_residual(s, bounded):  # type: ignore[no-untyped-def]
    _gradient(s)
    count, atoms, w, bars = s.count[0], s.atoms, s.w, s.bars
    multiplier, violation = 0.0, 0.0
    if s.shift > 0.0:
        for k in range(count):
            multiplier += w[atoms[k]]
        multiplier /= count
    for k in range(count):
        violation = max(violation, abs(w[atoms[k]] - multiplier))
        w[atoms[k]] = multiplier
    for j in range(len(w)):
        if not bounded and bars[j] != _DEPENDENT:
            violation = max(violation, w[j] - multiplier)
    size = s.scale[0] + s.largest * s.values[:count].sum()
    return violation / size if violation > 0.0 else 0.0
