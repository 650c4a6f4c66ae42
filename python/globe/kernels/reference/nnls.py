"""Non-negative least squares from a Gram matrix, row by row, in the steps of cpp/src/nnls_solver.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from globe.kernels.nnls import NnlsProblem, NnlsResult, NnlsStatus

Floats = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)
_FIRST_BLOCK = 8  # atoms that may enter an empty support together
_PATIENCE = 8  # exchanges without progress before atoms move one at a time


def solve(problem: NnlsProblem, result: NnlsResult, threads: int) -> None:
    """Fill in the result; one thread does it all."""
    largest = float(problem.gram.diagonal().max())
    matrix = problem.gram
    if problem.simplex:
        # Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant. Adding it leaves the problem as it is and makes G definite
        # wherever the solution is unique. Not a ridge.
        matrix = matrix + (largest or 1.0)
    for row, correlations in enumerate(problem.correlations):
        guess = None if problem.warm_start is None else problem.warm_start[row]
        solver = _Row(problem, matrix, largest, correlations)
        result.codes[row], result.status[row], result.kkt_residual[row] = solver.solve(guess)
        result.iterations[row] = solver.iterations


@dataclass
class _Row:
    """The problem for one right-hand side, and the point reached."""

    problem: NnlsProblem
    gram: Floats
    largest: float
    correlations: Floats
    iterations: int = 0
    support: list[int] = field(default_factory=list)  # in the order of entry
    values: Floats = field(default_factory=lambda: np.zeros(0))  # by place in the support
    multiplier: float = 0.0
    bounded: bool = False  # max_support kept an atom out
    blocked: set[int] = field(default_factory=set)  # entered on a gradient that was rounding noise
    aside: set[int] = field(default_factory=set)  # would enter, and the objective would fall for ever

    def __post_init__(self) -> None:
        self.c = self.correlations - self.problem.l1
        self.scale = float(np.abs(self.c).max())
        if self.problem.simplex:
            self.scale += self.largest
            self.vertex = int(np.argmin(0.5 * self.problem.gram.diagonal() - self.correlations))
            # The multiplier absorbs any constant in c; taking it out first avoids cancellation.
            self.c = self.c - self.c[self.vertex]

    def solve(self, guess: NDArray[np.bool_] | None) -> tuple[Floats, NnlsStatus, float]:
        bounded = self.problem.max_support > 0
        if guess is not None and not bounded:
            self.support = np.flatnonzero(guess).tolist()
        self.values = np.zeros(len(self.support))
        if self.problem.simplex and not self.support:
            self.support, self.values = [self.vertex], np.ones(1)
        if bounded or not self.exchange_blocks():
            self.move_single_atoms()
        self.make_feasible()
        residual = self.kkt_residual()
        codes = np.zeros_like(self.c)
        codes[self.support] = self.values
        if not residual <= self.problem.tolerance:
            return codes, NnlsStatus.NOT_CONVERGED, residual
        if self.bounded:
            return codes, NnlsStatus.SUPPORT_LIMIT, residual
        return codes, NnlsStatus.SINGULAR if self.aside else NnlsStatus.OPTIMAL, residual

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
            size = float(np.abs(self.values).sum())
            leaving = self.values < -_EPS * size
            entering = np.flatnonzero(w > self.threshold(size))
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
        norms = np.sqrt(self.problem.gram.diagonal())
        while self.settle():
            w = self.gradient()
            w[[*self.support, *self.aside, *self.blocked]] = 0.0
            w[w <= self.threshold(float(np.abs(self.values).sum()))] = 0.0
            if not w.any():
                return
            if 0 < limit <= len(self.support):
                self.bounded = True
                return
            with np.errstate(divide="ignore", invalid="ignore"):
                steepness = np.where(w > 0.0, w / norms, 0.0)
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
        side = self.gram[atom, self.support]
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
        free, ones = self.systems(np.stack([c, np.ones_like(c)], axis=1)).T
        self.multiplier = float((1.0 - free.sum()) / ones.sum())
        result: Floats = free + self.multiplier * ones
        return result

    def factorise(self, count: int) -> int | None:
        """Factor the first atoms of the support; the place of the first dependent one, to rounding."""
        index = np.array(self.support[:count], dtype=np.int64)
        self.factor, info = lapack.dpotrf(self.gram[np.ix_(index, index)], lower=1, clean=0)
        if info > 0:
            before = self.factorise(info - 1) if info > 1 else None
            return int(info - 1) if before is None else before
        floors = 4.0 * _EPS * np.arange(1, count + 1) * self.gram.diagonal()[index]
        small = np.flatnonzero(np.square(self.factor.diagonal()) <= floors)
        return int(small[0]) if len(small) else None

    def systems(self, sides: Floats) -> Floats:
        solutions: Floats
        solutions, _ = lapack.dpotrs(self.factor, sides, lower=1)
        return solutions

    def gradient(self) -> Floats:
        shift = self.multiplier if self.support else 0.0
        gradient: Floats = self.c + shift - self.values @ self.gram[self.support]
        return gradient

    def threshold(self, size: float) -> float:
        return 0.5 * self.problem.tolerance * (self.scale + self.largest * size)

    def remove(self, place: int) -> None:
        del self.support[place]
        self.values = np.delete(self.values, place)

    def keep_positive(self, values: Floats) -> None:
        positive = values > 0.0
        self.support = [atom for atom, keep in zip(self.support, positive, strict=True) if keep]
        self.values = values[positive]

    def normalise(self) -> None:
        if self.problem.simplex:
            self.values = self.values / self.values.sum()

    def make_feasible(self) -> None:
        self.keep_positive(self.values)
        if self.problem.simplex and not self.support:
            self.support, self.values = [self.vertex], np.ones(1)
        self.normalise()

    def kkt_residual(self) -> float:
        w = self.gradient()
        if self.problem.simplex:
            w -= w[self.support].mean()
        size = self.scale + self.largest * float(self.values.sum())
        used = np.abs(w[self.support]).max(initial=0.0)
        w[[*self.support, *self.aside]] = 0.0
        violation = used if self.bounded else max(used, float(w.max()))
        return float(violation) / size if violation > 0.0 else 0.0
