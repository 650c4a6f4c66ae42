"""Non-negative least squares from a Gram matrix, row by row, in the steps of cpp/src/nnls_solver.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from globe.kernels.nnls import NnlsProblem, NnlsResult, NnlsStatus
from globe.kernels.nnls_scale import CONVEX, ScaledGram, ScaledRows, scale, scale_rows

Floats = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)
_FIRST_BLOCK = 8  # atoms that may enter an empty support together
_PATIENCE = 8  # exchanges without progress before atoms move one at a time


def solve(problem: NnlsProblem, result: NnlsResult, threads: int) -> None:
    """Fill in the result; one thread does it all."""
    scaled = scale(problem.gram, problem.simplex)
    rows = scale_rows(scaled, problem.correlations, problem.l1)
    for row in range(len(problem.correlations)):
        guess = None if problem.warm_start is None else problem.warm_start[row]
        solver = _Row(problem, scaled, rows, row)
        result.codes[row], result.status[row] = solver.solve(guess)
        result.kkt_residual[row], result.scaled_residual[row] = solver.residuals
        result.iterations[row] = solver.iterations


@dataclass
class _Row:
    """The problem for one right-hand side in scaled variables, and the point reached."""

    problem: NnlsProblem
    scaled: ScaledGram
    rows: ScaledRows
    number: int
    iterations: int = 0
    support: list[int] = field(default_factory=list)  # in the order of entry
    values: Floats = field(default_factory=lambda: np.zeros(0))  # by place in the support
    multiplier: float = 0.0
    bounded: bool = False  # max_support kept an atom out
    blocked: set[int] = field(default_factory=set)  # entered on a gradient that was rounding noise
    aside: set[int] = field(default_factory=set)  # would enter, and the objective would fall for ever
    residuals: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.gram, self.norms, self.weights = self.scaled.gram, self.scaled.norms, self.scaled.weights
        self.indefinite = self.scaled.indefinite
        self.c = self.rows.sides[self.number]
        self.vertex = int(self.rows.vertices[self.number])
        self.overflow = bool(self.rows.overflows[self.number])

    def solve(self, guess: NDArray[np.bool_] | None) -> tuple[Floats, NnlsStatus]:
        bounded = self.problem.max_support > 0
        if guess is not None and not bounded:
            self.support = np.flatnonzero(guess).tolist()
        self.values = np.zeros(len(self.support))
        if self.problem.simplex and not self.support:
            self.start_at_vertex()
        if bounded or not self.exchange_blocks():
            self.move_single_atoms()
        self.make_feasible()
        self.residuals = self.measure()
        codes = np.zeros_like(self.c)
        exponents = self.scaled.exponents - (self.scaled.unit if self.problem.simplex else 0)
        with np.errstate(over="ignore", under="ignore"):
            codes[self.support] = np.ldexp(self.values, exponents[self.support] + self.rows.exponents[self.number])
        self.overflow |= bool(np.isinf(codes).any())
        return np.minimum(codes, np.finfo(np.float64).max), self.status()

    def status(self) -> NnlsStatus:
        if self.overflow:
            return NnlsStatus.OVERFLOW
        if self.indefinite:
            return NnlsStatus.INDEFINITE
        if not max(self.residuals) <= self.problem.tolerance:
            return NnlsStatus.NOT_CONVERGED
        if self.bounded:
            return NnlsStatus.SUPPORT_LIMIT
        return NnlsStatus.SINGULAR if self.aside else NnlsStatus.OPTIMAL

    def exchange_blocks(self) -> bool:
        """Exchange all infeasible atoms at once (Kim and Park 2011, section 3.2), while that makes progress.

        The support may at most double, which starts small supports small.
        """
        fewest, patience = len(self.c) + 1, _PATIENCE
        while True:
            while self.support:
                if self.iterations == self.problem.max_iterations:
                    return False
                found = self.minimum()
                if not isinstance(found, int):
                    self.iterations += 1
                    self.values = found
                    break
                self.remove(found)
            if self.problem.simplex and not self.support:
                return False
            w = self.gradient()
            w[self.support] = 0.0
            leaving = self.values < -_EPS * float(np.abs(self.values) @ self.norms[self.support])
            entering = np.flatnonzero(w > 0.5 * self.problem.tolerance * self.sizes())
            wrong = int(leaving.sum()) + len(entering)
            if wrong == 0:
                return True
            if wrong < fewest:
                fewest, patience = wrong, _PATIENCE
            elif patience == 0:
                return False
            else:
                patience -= 1
            self.keep_positive(np.where(leaving, 0.0, np.maximum(self.values, _TINY)))
            most = max(len(self.support), _FIRST_BLOCK)
            steepest = np.sort(entering[np.argsort(-w[entering], kind="stable")[:most]])
            self.support += steepest.tolist()
            self.values = np.append(self.values, np.zeros(len(steepest)))

    def move_single_atoms(self) -> None:
        """Lawson and Hanson (1974, chapter 23): from one feasible point to another of a lower objective.

        With a bound on the support, end where one more atom would exceed it.
        """
        limit = self.problem.max_support
        if limit == 0:
            self.make_feasible()
        while self.settle():
            w = self.gradient()
            w[[*self.support, *self.aside, *self.blocked]] = 0.0
            w[w <= 0.5 * self.problem.tolerance * self.sizes()] = 0.0
            if not w.any():
                return
            if 0 < limit <= len(self.support):
                self.bounded = True
                return
            with np.errstate(divide="ignore", invalid="ignore"):
                steepness = np.where(w > 0.0, w / self.norms, 0.0)
            self.support.append(int(np.argmax(steepness)))
            self.values = np.append(self.values, 0.0)

    def settle(self) -> bool:
        """Walk to the minimum over the support, dropping atoms that reach zero; False at the limit."""
        while self.support:
            if self.iterations == self.problem.max_iterations:
                return False
            target = self.minimum()
            if isinstance(target, int):
                atom, entering = self.support[target], self.values[target] == 0.0
                self.remove(target)
                self.normalise()
                if entering:
                    self.exchange_dependent(atom)
                continue
            self.iterations += 1
            if (target > 0.0).all():
                self.values = target
                return True
            if self.values[-1] == 0.0 and target[-1] <= 0.0:
                self.blocked.add(self.support[-1])
                self.remove(len(self.support) - 1)
                continue
            falling = target <= 0.0
            steps = self.values[falling] / (self.values[falling] - target[falling])
            step = float(steps.min())
            moved = self.values + step * (target - self.values)
            moved[np.flatnonzero(falling)[steps <= step]] = 0.0
            self.keep_positive(moved)
            self.blocked.clear()
            self.aside.clear()
        return True

    def exchange_dependent(self, atom: int) -> None:
        """Let an atom enter that is a combination of those in use.

        Along that combination the objective falls on a straight line until an atom in use leaves; if none
        ever does, there is no minimum.
        """
        if isinstance(self.minimum(), int):
            return
        side = self.scaled.lifted[atom, self.support]
        coefficients = self.systems(side[:, None])[:, 0] if self.support else side
        falling = coefficients > np.sqrt(_EPS) * np.abs(coefficients).max(initial=0.0)
        if not falling.any():
            self.aside.add(atom)
            return
        steps = self.values[falling] / coefficients[falling]
        step = float(steps.min())
        moved = self.values - step * coefficients
        moved[np.flatnonzero(falling)[steps <= step]] = 0.0
        self.keep_positive(moved)
        self.support.append(atom)
        self.values = np.append(self.values, step)
        self.normalise()
        self.blocked.clear()
        self.aside.clear()

    def minimum(self) -> Floats | int:
        """Minimise over the support without signs, or return the place of the first dependent atom."""
        if not self.support:
            return np.zeros(0)
        dependent = self.factorise(len(self.support))
        if dependent is not None:
            return dependent
        c = self.c[self.support]
        if not self.problem.simplex:
            return self.systems(c[:, None])[:, 0]
        weights, values, short = self.weights[self.support], np.zeros(len(c)), 1.0
        ones, inner = self.systems(weights[:, None])[:, 0], self.gram[np.ix_(self.support, self.support)]
        self.multiplier, rest = 0.0, c
        for _ in range(3 if self.scaled.polished else 1):
            free = self.systems(rest[:, None])[:, 0]
            shift = (short - float(weights @ free)) / float(weights @ ones)
            values = values + (free + shift * ones)
            self.multiplier += shift - self.scaled.lift * short
            rest, short = c + self.multiplier * weights - inner @ values, 1.0 - float(weights @ values)
        return values

    def factorise(self, count: int) -> int | None:
        """Factor the first atoms of the support; the place of the first dependent one, to rounding."""
        index = np.array(self.support[:count], dtype=np.int64)
        self.factor, info = lapack.dpotrf(self.scaled.lifted[np.ix_(index, index)], lower=1, clean=0)
        if info > 0:
            before = self.factorise(info - 1) if info > 1 else None
            return self.examine(int(info - 1)) if before is None else before
        floors = 4.0 * _EPS * np.arange(1, count + 1) * self.scaled.lifted.diagonal()[index]
        small = np.flatnonzero(np.square(self.factor.diagonal()) <= floors)
        return self.examine(int(small[0])) if len(small) else None

    def examine(self, place: int) -> int:
        """Note where the curvature is negative, at an atom that depends on those before it."""
        atom, before = self.support[place], self.support[:place]
        curvature = size = self.scaled.lifted[atom, atom]
        if before:
            factor = self.factor[:place, :place]
            known, _ = lapack.dtrtrs(factor, self.scaled.lifted[atom, before], lower=1)
            curvature = size - known @ known
        self.indefinite |= bool(curvature < (1.0 - CONVEX) * size)
        return place

    def systems(self, sides: Floats) -> Floats:
        solutions: Floats
        solutions, _ = lapack.dpotrs(self.factor, sides, lower=1)
        return solutions

    def gradient(self) -> Floats:
        gradient: Floats = self.c - self.values @ self.gram[self.support]
        if self.support:
            gradient += self.multiplier * self.weights
        return gradient

    def sizes(self) -> Floats:
        """What the gradient is relative to, by atom: see NnlsResult.scaled_residual."""
        values = np.abs(self.values)
        size = float(values @ self.norms[self.support])
        sizes: Floats = np.abs(self.c) + self.norms * size
        if self.problem.simplex:
            sizes = sizes + self.weights * (float(values @ np.abs(self.c[self.support])) + size * size)
        return sizes

    def remove(self, place: int) -> None:
        del self.support[place]
        self.values = np.delete(self.values, place)

    def keep_positive(self, values: Floats) -> None:
        positive = values > 0.0
        self.support = [atom for atom, keep in zip(self.support, positive, strict=True) if keep]
        self.values = values[positive]

    def normalise(self) -> None:
        if self.problem.simplex:
            self.values = self.values / (self.values @ self.weights[self.support])

    def start_at_vertex(self) -> None:
        self.support, self.values = [self.vertex], 1.0 / self.weights[[self.vertex]]

    def make_feasible(self) -> None:
        self.keep_positive(self.values)
        if self.problem.simplex and not self.support:
            self.start_at_vertex()
        self.normalise()

    def measure(self) -> tuple[float, float]:
        """kkt_residual and scaled_residual of NnlsResult."""
        w = self.gradient()
        if self.problem.simplex:
            w -= (w[self.support] @ self.values) * self.weights
        w[self.support] = np.abs(w[self.support])
        w[list(self.aside)] = 0.0
        if self.bounded:
            w[~np.isin(np.arange(len(w)), self.support)] = 0.0
        w = np.maximum(w, 0.0)
        size = float(self.rows.sizes[self.number] + self.norms.max() ** 2 * (self.values @ self.weights[self.support]))
        worst, scaled = float((w / self.weights).max()), w[w > 0.0] / self.sizes()[w > 0.0]
        return worst / size if worst > 0.0 else 0.0, float(scaled.max(initial=0.0))
