"""Non-negative least squares from a Gram matrix.

Block principal pivoting finds most solutions in a few steps (Kim and Park, "Fast nonnegative matrix
factorization: an active-set-like method and comparisons", SIAM J. Sci. Comput. 33, 2011). Where it
stops improving, an active-set method finishes, which cannot cycle because every step lowers the
objective (Lawson and Hanson, "Solving least squares problems", 1974; Gram form after Bro and de Jong,
"A fast non-negativity-constrained least squares algorithm", J. Chemometrics 11, 1997).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lapack

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_EPS = float(np.finfo(np.float64).eps)
_PATIENCE = 3  # block exchanges without progress before the active-set method takes over


class NnlsStatus(IntEnum):
    """How the solution of one right-hand side came out."""

    OPTIMAL = 0
    """The optimality conditions hold to the tolerance."""
    SINGULAR = 1
    """The Gram matrix is singular on the atoms in use: an atom was set aside, the rest is optimal."""
    NOT_CONVERGED = 2
    """The iteration limit was reached, or rounding kept the conditions above the tolerance."""


@dataclass(frozen=True)
class NnlsResult:
    """Solutions of :func:`nnls`, one row per right-hand side."""

    codes: Floats
    """Solutions α, shape (n, m)."""
    status: NDArray[np.int8]
    """:class:`NnlsStatus` of each row, shape (n,)."""
    iterations: NDArray[np.int64]
    """Linear systems solved for each row, shape (n,)."""
    kkt_residual: Floats
    """Largest violation of the optimality conditions, relative to the size of the gradient's terms, shape (n,)."""


def nnls(
    gram: ArrayLike,
    correlations: ArrayLike,
    *,
    l1: float = 0.0,
    simplex: bool = False,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
) -> NnlsResult:
    """Solve ``argmin_{α ≥ 0} ½ αᵀGα − cᵀα + l1 Σα`` for every row c of the correlations.

    With ``simplex`` the entries of α must also sum to 1. For a dictionary D with one atom per row and
    a target t, ``G = D Dᵀ`` and ``c = D t``.

    Parameters
    ----------
    gram : array_like, shape (m, m)
        G, symmetric and positive semidefinite. Never regularised: see :class:`NnlsStatus`.
    correlations : array_like, shape (n, m)
        One right-hand side per row.
    l1 : float
        Penalty on the sum of the codes, 0 or more; must be 0 with ``simplex``.
    simplex : bool
        Require ``Σα = 1``.
    tolerance : float
        Bound on ``kkt_residual``, and on the gradient at which an atom enters.
    max_iterations : int, optional
        Linear systems per right-hand side; ``10 m + 30`` by default.

    Returns
    -------
    NnlsResult
        Codes, status, iterations and residual of every row.

    Raises
    ------
    ValueError
        If an argument has a wrong shape or value, with the argument named.
    """
    matrix, targets = _validate(gram, correlations, l1, simplex, tolerance, max_iterations)
    n, m = targets.shape
    limit = 10 * m + 30 if max_iterations is None else int(max_iterations)
    largest = float(matrix.diagonal().max())
    if simplex:
        # Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant. Adding it leaves the problem as it is and makes G
        # definite wherever the solution is unique. Not a ridge.
        matrix = matrix + (largest or 1.0)
    else:
        targets = targets - l1
    solver = _Solver(matrix, simplex=simplex, tolerance=tolerance, limit=limit)

    codes = np.zeros((n, m))
    status = np.zeros(n, dtype=np.int8)
    iterations = np.zeros(n, dtype=np.int64)
    residual = np.zeros(n)
    guesses = solver.unconstrained(targets) > 0.0
    for row in range(n):
        codes[row], status[row], iterations[row], residual[row] = solver.solve(targets[row], guesses[row])
    return NnlsResult(codes, status, iterations, residual)


class _Solver:
    """The problem for one Gram matrix, ready to be solved for many right-hand sides."""

    def __init__(self, gram: Floats, *, simplex: bool, tolerance: float, limit: int) -> None:
        self.gram = gram
        self.diagonal = gram.diagonal().copy()
        self.largest = float(self.diagonal.max())
        self.simplex = simplex
        self.tolerance = tolerance
        self.limit = limit

    def unconstrained(self, targets: Floats) -> Floats:
        """Solutions without the sign constraint, where they exist: the first guess at the supports."""
        everything = np.arange(len(self.gram))
        factor = self._factor(everything)
        if factor is None:
            return targets
        if self.simplex:
            targets = targets - targets.mean(axis=1, keepdims=True)
        solutions, _ = lapack.dpotrs(factor, targets.T, lower=1)
        if self.simplex:
            ones, _ = lapack.dpotrs(factor, np.ones(len(self.gram)), lower=1)
            solutions += ones[:, None] * ((1.0 - solutions.sum(axis=0)) / ones.sum())
        return np.ascontiguousarray(solutions.T)

    def solve(self, c: Floats, guess: Bools) -> tuple[Floats, NnlsStatus, int, float]:
        scale = float(np.abs(c).max()) + (self.largest if self.simplex else 0.0)
        if scale == 0.0:
            return np.zeros_like(c), NnlsStatus.OPTIMAL, 0, 0.0
        passive, used, solved = self._block_pivoting(c, guess, scale)
        if solved is not None:
            x, aside = np.zeros_like(c), np.zeros_like(guess)
            x[passive] = np.maximum(solved, 0.0)
            if self.simplex:
                x /= x.sum()
        else:
            x, aside, more = self._active_set(c, passive, scale, self.limit - used)
            used += more
        residual = self._kkt_residual(c, x, aside)
        if residual > self.tolerance:
            status = NnlsStatus.NOT_CONVERGED
        else:
            status = NnlsStatus.SINGULAR if aside.any() else NnlsStatus.OPTIMAL
        return x, status, used, residual

    def _block_pivoting(self, c: Floats, passive: Bools, scale: float) -> tuple[Bools, int, Floats | None]:
        """Exchange all infeasible atoms at once while their number falls; None where it does not."""
        fewest, patience = len(c) + 1, _PATIENCE
        used = 0
        while used < self.limit:
            index = np.flatnonzero(passive)
            if len(index) == 0 and self.simplex:
                break
            solution = self._equality(c, index)
            used += 1
            if solution is None:
                break
            x, shift = solution
            w = c + shift - x @ self.gram[index]
            w[index] = 0.0
            size = float(np.abs(x).sum())
            negative = x < -_EPS * size
            entering = w > self.tolerance * (scale + self.largest * size) * 0.5
            wrong = int(np.count_nonzero(negative)) + int(np.count_nonzero(entering))
            if wrong == 0:
                return passive, used, x
            if wrong < fewest:
                fewest, patience = wrong, _PATIENCE
            elif patience == 0:
                break
            else:
                patience -= 1
            passive = passive ^ entering
            passive[index[negative]] = False
        return passive, used, None

    def _active_set(self, c: Floats, guess: Bools, scale: float, limit: int) -> tuple[Floats, Bools, int]:
        """Lawson and Hanson from a feasible point; atoms that make the system singular are set aside."""
        x = np.zeros_like(c)
        aside = np.zeros_like(guess)
        order: list[int] = []  # the passive set, the newest atom last
        start = np.flatnonzero(guess)
        solution = self._equality(c, start) if len(start) else None
        if solution is not None and (solution[0] > 0.0).any():
            positive = solution[0] > 0.0
            order = start[positive].tolist()
            x[order] = solution[0][positive]
            if self.simplex:
                x /= x.sum()
        elif self.simplex:
            vertex = int(np.argmin(0.5 * self.diagonal - c))
            order = [vertex]
            x[vertex] = 1.0

        used = 0
        shift = 0.0
        blocked = aside.copy()  # atoms that turned out not to enter although their gradient said so
        settled = not order
        while used < limit:
            if not settled:
                # Inner loop: walk to the solution on the passive set, dropping atoms that reach zero.
                while order and used < limit:
                    index = np.array(order)
                    solution = self._equality(c, index)
                    used += 1
                    if solution is None:
                        newest = order.pop()
                        aside[newest] = True
                        if self.simplex and x[newest] > 0.0:
                            x[newest] = 0.0
                            x /= x.sum()
                        x[newest] = 0.0
                        continue
                    target, shift = solution
                    if (target > 0.0).all():
                        x[:] = 0.0
                        x[index] = target
                        break
                    current = x[index]
                    if current[-1] == 0.0 and target[-1] <= 0.0:
                        blocked[order.pop()] = True  # entered on a gradient that was rounding noise
                        continue
                    falling = target <= 0.0
                    steps = current[falling] / (current[falling] - target[falling])
                    step = float(steps.min())
                    moved = np.maximum(current + step * (target - current), 0.0)
                    moved[np.flatnonzero(falling)[steps <= step]] = 0.0
                    x[index] = moved
                    order = [atom for atom, value in zip(order, moved, strict=True) if value > 0.0]
                    blocked[:] = False
                settled = True
                if not order:
                    shift = 0.0
            w = c + shift - self.gram @ x
            w[order] = -np.inf
            w[aside | blocked] = -np.inf
            atom = int(np.argmax(w))
            if w[atom] <= 0.5 * self.tolerance * (scale + self.largest * float(x.sum())):
                break
            order.append(atom)
            settled = False
        return x, aside, used

    def _equality(self, c: Floats, index: NDArray[np.int64]) -> tuple[Floats, float] | None:
        """Minimise over the atoms in index without signs; also the multiplier of Σα = 1. None if singular."""
        if len(index) == 0:
            return np.zeros(0), 0.0
        factor = self._factor(index)
        if factor is None:
            return None
        if not self.simplex:
            solution, _ = lapack.dpotrs(factor, c[index], lower=1)
            return solution, 0.0
        # The multiplier absorbs any constant in c; taking it out first avoids cancellation.
        centre = float(c[index].mean())
        sides = np.ones((len(index), 2), order="F")
        sides[:, 0] = c[index] - centre
        solutions, _ = lapack.dpotrs(factor, sides, lower=1)
        free, ones = solutions[:, 0], solutions[:, 1]
        shift = float((1.0 - free.sum()) / ones.sum())
        return free + shift * ones, shift - centre

    def _factor(self, index: NDArray[np.int64]) -> Floats | None:
        block = self.gram[index[:, None], index]
        factor, info = lapack.dpotrf(block.T, lower=1, clean=0, overwrite_a=1)
        if info != 0:
            return None
        pivots = np.square(factor.diagonal())
        if (pivots <= 4.0 * len(index) * _EPS * self.diagonal[index]).any():
            return None
        result: Floats = factor
        return result

    def _kkt_residual(self, c: Floats, x: Floats, aside: Bools) -> float:
        product = self.gram @ x
        w = c - product
        positive = x > 0.0
        if self.simplex:
            w -= w[positive].mean() if positive.any() else 0.0
        violation = np.where(positive, np.abs(w), np.maximum(w, 0.0))
        violation[aside] = 0.0
        scale = float(np.abs(c).max()) + self.largest * float(x.sum())
        return float(violation.max()) / scale if scale > 0.0 else 0.0


def _validate(
    gram: ArrayLike,
    correlations: ArrayLike,
    l1: float,
    simplex: bool,
    tolerance: float,
    max_iterations: int | None,
) -> tuple[Floats, Floats]:
    matrix = np.asarray(gram, dtype=np.float64)
    targets = np.asarray(correlations, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"gram: found shape {matrix.shape}; expected (m, m) with m of at least 1")
    m = matrix.shape[0]
    if targets.ndim != 2 or targets.shape[1] != m:
        raise ValueError(
            f"correlations: found shape {targets.shape}; expected (n, {m}); pass one right-hand side per row"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("gram: found NaN or infinity; expected finite entries; check the vectors it was made from")
    if not np.isfinite(targets).all():
        raise ValueError("correlations: found NaN or infinity; expected finite entries; check the targets")
    asymmetry = float(np.abs(matrix - matrix.T).max())
    if asymmetry > 1e-6 * float(np.abs(matrix).max()):
        raise ValueError(f"gram: found an asymmetry of {asymmetry:.3g}; expected a symmetric matrix; use (G + Gᵀ)/2")
    if (matrix.diagonal() < 0.0).any():
        raise ValueError("gram: found a negative diagonal entry; expected a positive semidefinite matrix")
    if not 0.0 <= l1 < np.inf:
        raise ValueError(f"l1: found {l1}; expected a finite number of at least 0")
    if simplex and l1 > 0.0:
        raise ValueError(f"l1: found {l1} with simplex=True; expected 0, because the sum is fixed; drop one of the two")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance: found {tolerance}; expected a number between 0 and 1; 1e-10 is a good choice")
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations: found {max_iterations}; expected at least 1, or None for the default")
    return np.ascontiguousarray(0.5 * (matrix + matrix.T)), targets
