"""Non-negative least squares from the matrix itself, started at a solution from its Gram matrix.

The Gram matrix has the square of the matrix's condition number, and so half of its digits. Residuals and corrections
here come from the matrix alone, by its QR factorisation (Lawson and Hanson, "Solving least squares problems", 1974,
chapter 23; the residual's last digits as in Björck, "Iterative refinement of linear least squares solutions", BIT 7,
1967). Columns are scaled by powers of two first, which rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from globe.kernels.nnls import NnlsProblem, NnlsResult, NnlsStatus

Floats = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_NOISE = 8.0  # of a gradient, in roundings of what it is summed from


def refine(problem: NnlsProblem, matrix: Floats, targets: Floats, result: NnlsResult) -> None:
    """Improve every row of a result in place.

    Parameters
    ----------
    problem : NnlsProblem
        What the result solves.
    matrix : array, shape (k, m)
        A, one atom per column.
    targets : array, shape (n, k)
        b, one per row.
    result : NnlsResult
        Its codes are where the search starts.
    """
    norms = np.abs(matrix).max(axis=0, initial=0.0)
    exponents = -np.frexp(norms)[1]
    scaled = np.ldexp(matrix, exponents)
    for row, target in enumerate(targets):
        unit = 0 if problem.simplex else int(np.frexp(np.abs(target).max(initial=0.0))[1])
        solver = _Row(problem, scaled, np.ldexp(target, -unit), exponents, unit)
        with np.errstate(over="ignore", under="ignore"):
            result.codes[row], result.status[row] = solver.solve(np.ldexp(result.codes[row], -exponents - unit))
        result.iterations[row] += solver.iterations
        result.kkt_residual[row], result.scaled_residual[row] = solver.residuals


@dataclass
class _Row:
    """The problem for one target in scaled variables, and the point reached."""

    problem: NnlsProblem
    matrix: Floats
    target: Floats
    exponents: NDArray[np.int64]  # of the columns' factors
    unit: int  # exponent of the target's
    iterations: int = 0
    support: list[int] = field(default_factory=list)
    blocked: set[int] = field(default_factory=set)  # entered on a gradient that was rounding noise
    residuals: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.weights = np.ldexp(1.0, self.exponents)  # Σα = Σ weights · values on the simplex
        self.penalty = np.ldexp(self.problem.l1, self.exponents - self.unit)
        self.norms = np.sqrt(np.square(self.matrix).sum(axis=0))
        self.determined = self.matrix.shape[0] >= self.matrix.shape[1]

    def solve(self, codes: Floats) -> tuple[Floats, NnlsStatus]:
        """From a feasible point to the minimum; what is returned is in the caller's variables."""
        bound, status = self.problem.max_support, NnlsStatus.OPTIMAL
        self.values = codes if self.problem.simplex else self.start(codes)
        self.support = np.flatnonzero(self.values).tolist()
        sizes = np.where(self.norms > 0.0, self.norms, 1.0) if self.determined or bound > 0 else self.weights
        bounded, finished = False, self.settle()
        while finished:
            gradient, noise = self.gradient()
            gradient[[*self.support, *self.blocked]] = 0.0
            candidates = np.where(gradient > noise, gradient / sizes, 0.0)
            if not candidates.any():
                break
            if 0 < bound <= len(self.support):
                bounded = True
                break
            self.support.append(int(np.argmax(candidates)))
            finished = self.settle()
        self.residuals = self.measure(bounded)
        result = np.ldexp(self.values, self.exponents + (0 if self.problem.simplex else self.unit))
        if np.isinf(result).any():
            status = NnlsStatus.OVERFLOW
        elif not (finished and self.residuals[1] <= self.problem.tolerance):
            status = NnlsStatus.NOT_CONVERGED
        elif bounded:
            status = NnlsStatus.SUPPORT_LIMIT
        return np.minimum(result, np.finfo(np.float64).max), status

    def start(self, codes: Floats) -> Floats:
        """The Gram matrix's solution; where the solution may be one of many, zero.

        From zero the way is Lawson and Hanson's, by the gradient as the caller scales it, and ends where theirs does.
        """
        return codes if self.determined and np.isfinite(codes).all() else np.zeros_like(codes)

    def settle(self) -> bool:
        """Walk to the minimum over the support; atoms that reach zero leave. False at the limit of iterations."""
        while self.support:
            if self.iterations == self.problem.max_iterations:
                return False
            self.iterations += 1
            newest, place = self.support[-1], self.minimum()
            if isinstance(place, int):
                self.leave(place)
                continue
            if self.values[newest] == 0.0 and place[-1] <= 0.0:
                self.blocked.add(newest)
                self.support.pop()
                continue
            start = self.values[self.support]
            falling = place <= 0.0
            if not falling.any():
                self.values[self.support] = place
                return True
            steps = start[falling] / (start[falling] - place[falling])
            step = float(steps.min())
            moved = np.maximum(start + step * (place - start), 0.0)
            moved[np.flatnonzero(falling)[steps <= step]] = 0.0
            self.keep(moved)
        return True

    def leave(self, place: int) -> None:
        """Take out an atom that is a combination of the others in use, without a change of what they compose."""
        atom = self.support[place]
        others = [one for one in self.support if one != atom]
        columns, column = self.matrix[:, others], self.matrix[:, atom]
        if self.problem.simplex:
            columns = np.vstack([columns, self.weights[others]])
            column = np.append(column, self.weights[atom])
        mixture = np.linalg.lstsq(columns, column, rcond=None)[0]
        # Along atom − mixture what is composed stays: go where the first of them all reaches zero.
        direction = np.append(mixture, -1.0) if self.penalty[atom] >= mixture @ self.penalty[others] else None
        if direction is None:
            direction = np.append(-mixture, 1.0)
        order = [*others, atom]
        start = self.values[order]
        falling = direction < 0.0
        steps = start[falling] / -direction[falling]
        step = float(steps.min())
        moved = np.maximum(start + step * direction, 0.0)
        moved[np.flatnonzero(falling)[steps <= step]] = 0.0
        self.support = order
        self.keep(moved)

    def keep(self, moved: Floats) -> None:
        self.values[self.support] = moved
        self.support = [atom for atom in self.support if self.values[atom] > 0.0]
        self.blocked.clear()

    def minimum(self) -> Floats | int:
        """The least squares solution on the support without signs, or the place of an atom that depends on others."""
        columns, weights = self.matrix[:, self.support], self.weights[self.support]
        if not self.problem.simplex:
            factor = _Factor(columns)
            if factor.dependent is not None:
                return factor.dependent
            values = factor.solve(self.target, self.penalty[self.support])
            rest = _exact(self.target, columns, values)
            return values + factor.solve(rest, self.penalty[self.support], columns.T @ rest)
        # The smallest atom's code follows from the sum: differences of the others to it lose no digits.
        base = int(np.argmax(weights))
        others = np.flatnonzero(np.arange(len(weights)) != base)
        ratios = weights[others] / weights[base]
        differences = columns[:, others] - columns[:, [base]] * ratios
        values = np.zeros(len(weights))
        values[base] = 1.0 / weights[base]
        if len(others) == 0:
            return values
        sizes = 2.0 ** -np.frexp(np.abs(differences).max(axis=0, initial=0.0))[1]
        factor = _Factor(differences * sizes, np.maximum(1.0, ratios) * sizes)
        if factor.dependent is not None:
            return int(others[factor.dependent])
        for _ in range(2):
            step = sizes * factor.solve(_exact(self.target, columns, values), np.zeros(len(others)))
            values[others] += step
            values[base] -= float(ratios @ step)
        return values

    def gradient(self) -> tuple[Floats, Floats]:
        """The gradient and its rounding noise; on the simplex less the multiplier, times the weights."""
        rest = _exact(self.target, self.matrix[:, self.support], self.values[self.support])
        w = self.matrix.T @ rest - self.penalty
        size = float(np.linalg.norm(self.target) + self.norms @ self.values)
        noise = _NOISE * _EPS * self.norms * size
        if self.problem.simplex:
            shared = float(self.values @ w)
            w = w - shared * self.weights
            noise = noise + _NOISE * _EPS * size * float(self.norms @ self.values) * self.weights
        return w, noise

    def measure(self, bounded: bool) -> tuple[float, float]:
        """kkt_residual and scaled_residual of NnlsResult, from the matrix."""
        w, _ = self.gradient()
        c = self.matrix.T @ self.target - self.penalty
        used = self.values > 0.0
        w = np.where(used, np.abs(w), 0.0 if bounded else np.maximum(w, 0.0))
        size = float(self.norms @ self.values)
        sizes = (self.norms + (size * self.weights if self.problem.simplex else 0.0)) * (
            float(np.linalg.norm(self.target)) + size
        ) + self.penalty
        wrong = w > 0.0
        scaled = float((w[wrong] / sizes[wrong]).max(initial=0.0))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            largest = 1.0 / self.weights.min()  # the largest atom, to a factor; all in its units
            shares = self.weights * largest
            total = np.abs(c / shares).max() + float(np.square(self.norms / shares).max()) * float(self.values @ shares)
            worst = float((w / shares).max())
        return worst / total if worst > 0.0 else 0.0, scaled


class _Factor:
    """A QR factor of columns, with the place of the first that depends on the others, to rounding."""

    def __init__(self, columns: Floats, sizes: Floats | float = 1.0) -> None:
        """`sizes`: of what the columns were computed from, which is what they are rounded relative to."""
        count = columns.shape[1]
        q, r, order = scipy.linalg.qr(columns, mode="economic", pivoting=True)
        pivots = np.zeros(count)
        pivots[: min(r.shape)] = np.abs(r.diagonal())
        small = pivots <= _EPS * max(columns.shape) * np.broadcast_to(sizes, count)[order]
        self.dependent = int(order[np.argmax(small)]) if small.any() else None
        self.q, self.r, self.order = q, r, order

    def solve(self, target: Floats, penalty: Floats, gradient: Floats | None = None) -> Floats:
        """argmin of ½‖columns x − target‖² + penalty · x; with `gradient`, Aᵀ target as it was computed."""
        result = np.empty(len(self.order))
        side = self.q.T @ target
        if penalty.any():
            ahead = -penalty if gradient is None else gradient - penalty
            back = scipy.linalg.solve_triangular(self.r, ahead[self.order], trans="T")
            side = back if gradient is not None else side + back
        result[self.order] = scipy.linalg.solve_triangular(self.r, side)
        return result


def _exact(target: Floats, columns: Floats, values: Floats) -> Floats:
    """target − columns @ values, summed in the longest float of the machine and rounded once."""
    rest = target - (columns.astype(np.longdouble) * values).sum(axis=1)
    result: Floats = rest.astype(np.float64)
    return result
