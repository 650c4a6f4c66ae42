"""Non-negative least squares from a Gram matrix, row by row, in the steps of cpp/src/nnls_solver.cpp."""

from __future__ import annotations

import numpy as np

from globe.kernels.backends import run_ranges
from globe.kernels.nnls import NnlsProblem, NnlsResult
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
_OPTIMAL, _SINGULAR, _NOT_CONVERGED, _SUPPORT_LIMIT = range(4)


def solve(problem: NnlsProblem, result: NnlsResult, threads: int) -> None:
    """Fill in the result."""
    nobody = np.zeros((0, len(problem.gram)), np.bool_)
    options = (problem.l1, problem.max_support, nobody if problem.warm_start is None else problem.warm_start)
    outputs = (result.codes, result.status, result.iterations, result.kkt_residual)

    def rows(begin: int, end: int) -> None:
        _solve_rows(new_row(problem), problem.correlations, *options, *outputs, begin, end)

    run_ranges(rows, len(problem.correlations), threads)


@jit
def _solve_rows(s, correlations, l1, max_support, warm, codes, status, iterations, residuals, begin, end):  # type: ignore[no-untyped-def]
    for row in range(begin, end):
        vertex = begin_row(s, correlations[row], l1)
        if len(warm) and max_support == 0:
            for j in range(len(s.c)):
                if warm[row, j]:
                    add(s, j, 0.0)
        if s.shift > 0.0 and s.count[0] == 0:
            add(s, vertex, 1.0)
        bounded = False
        if max_support > 0 or not _exchange_blocks(s):
            bounded = _move_single_atoms(s, max_support, vertex)
        make_feasible(s, vertex)
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
                if bar == DEPENDENT:
                    status[row] = _SINGULAR


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
        if s.shift > 0.0 and s.count[0] == 0:
            return False
        least, size = _entering_gradient(s)
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
        least, _ = _entering_gradient(s)
        best, steepest = -1, 0.0
        for j in range(len(s.c)):
            if s.w[j] > least and s.bars[j] == FREE:
                norm = np.sqrt(s.gram[j, j])
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
    """The gradient, zero at the atoms in use; the least at which an atom enters; the sum of |values|."""
    count, atoms, values, w = s.count[0], s.atoms, s.values, s.w
    find_gradient(s)
    size = 0.0
    for k in range(count):
        size += abs(values[k])
        w[atoms[k]] = 0.0
    return 0.5 * s.tolerance * (s.scale[0] + s.largest * size), size


@jit
def _kkt_residual(s, bounded):  # type: ignore[no-untyped-def]
    find_gradient(s)
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
        if not bounded and bars[j] != DEPENDENT:
            violation = max(violation, w[j] - multiplier)
    size = s.scale[0] + s.largest * s.values[:count].sum()
    return violation / size if violation > 0.0 else 0.0
