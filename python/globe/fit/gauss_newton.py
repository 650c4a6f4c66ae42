"""Gauss-Newton steps of the joint fit: conjugate gradients on the experts' own curvature, with no pass over W."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import correlations_at, matmul, mixtures, scatter_add
from globe.compute.passes import Engine, engine, within
from globe.fit.objective import Value
from globe.fit.point import Point, Vector
from globe.fit.preconditioner import Preconditioner
from globe.fit.problem import Problem

Array = NDArray[np.float64]
_RESIDUAL = 0.1


class Operator:
    """The Gauss-Newton matrix of f at a point, its left factors eliminated, times vectors.

    H (dB, dv) has the parts 2 Σ_i α_ij Z_i for an atom and 2 ⟨Z_i, B_j⟩ ∂α_ij/∂v_ij for a code's variable, with
    Z_i = C_i (Σ_k α_ik dB_k + dα_ik B_k) K_i, all over Σ_i ‖W'_i‖² (Kaufman, 1975, leaves out the same terms).

    Parameters
    ----------
    problem : Problem
        Whose last pass was at this point.
    point : Point
    scale : float
    workers : Engine
    """

    def __init__(self, problem: Problem, point: Point, scale: float, workers: Engine) -> None:
        self._problem, self._point, self._scale, self._workers = problem, point, scale, workers
        (m, *matrix), device = point.bank.shape, point.bank.device
        self._mixed = torch.empty(problem.at_once, *matrix, dtype=problem.kept, device=device)
        self._room = torch.empty(problem.at_once, *matrix, device=device)
        self._both = torch.empty(2 * m, *matrix, dtype=problem.kept, device=device)
        self._both[:m] = point.bank

    def __call__(self, vector: Vector) -> Vector:
        """H times a vector."""
        problem, point, chain = self._problem, self._point, self._point.chain
        m, codes = len(point.bank), np.hstack([chain * vector.codes, point.codes])
        total, slopes = torch.zeros_like(point.bank), np.zeros_like(point.codes)
        bank = self._both[:m]
        self._both[m:] = ranks.assembled(vector.bank.to(problem.kept), m)
        lefts, hidden = problem.lefts.take(problem.spans), problem.hidden.take(problem.spans)
        for span, left, columns in zip(problem.spans, lefts, hidden, strict=True):
            mixed = mixtures(codes[span], self._both, self._mixed)

            def work(
                part: slice,
                span: slice = span,
                mixed: torch.Tensor = mixed,
                left: torch.Tensor = left,
                columns: torch.Tensor = columns,
            ) -> None:
                projected = self._project(within(span, part), mixed[part], columns[part])
                matmul(left[part], projected, out=mixed[part])

            self._workers.run(work, span.stop - span.start)
            slopes[span] = correlations_at(chain[span], mixed, bank)
            scatter_add(point.codes[span], mixed, total, self._room)
        total = ranks.scattered(total)
        return Vector(total.mul_(2 * self._scale), ranks.summed_array(slopes) * chain * (2 * self._scale))

    def _project(self, numbers: slice, matrices: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """X_i K_i."""
        metric = self._problem.metric
        if self._problem.whole:
            return matmul(matrices, columns)
        seen = matrices if metric is None else metric.seen(numbers, matrices)
        free = seen - matmul(matmul(seen, columns.mT), columns)
        return free if metric is None else metric.unseen(numbers, free)


@dataclass(frozen=True)
class Newton:
    """A Gauss-Newton step.

    Parameters
    ----------
    step : Vector
    slope : float
        Of f along it.
    iterations : int
        Products with the Gauss-Newton matrix.
    """

    step: Vector
    slope: float
    iterations: int


def newton_step(problem: Problem, point: Point, value: Value, previous: Vector | None, steps: int) -> Newton:
    """argmin over (dB, dv) of the quadratic model of f, by preconditioned conjugate gradients.

    The iteration starts with the best multiple of the step before and stays conjugate to it (deflation, Saad et al.,
    2000): what a few iterations leave undone in one step, because the matrix is ill-conditioned, is undone in the next
    one for much the same directions. It ends early once the preconditioned residual is `_RESIDUAL` of the first.

    Parameters
    ----------
    problem : Problem
        Whose last pass was at the point.
    point : Point
    value : Value
        At the point. The memory of its tensors is taken.
    previous : Vector or None
        The step before, in the coordinates of now.
    steps : int
        At most.
    """
    chain = point.chain
    with engine(problem.device) as workers:
        operator = Operator(problem, point, value.scale, workers)
        precondition = Preconditioner(value, point, problem.metric is not None, workers)
        residual = Vector(value.bank.neg_(), -value.codes * chain)
        step = Vector(torch.zeros_like(residual.bank), np.zeros_like(point.codes))
        if previous is not None:  # a code that has come to zero since has no variable
            previous = Vector(previous.bank, np.where(chain != 0, previous.codes, 0.0))
        slope, taken, deflated = 0.0, 0, _Deflated.of(previous, operator)
        if deflated is not None:
            along = residual.dot(deflated.direction)
            size = along / deflated.curvature
            step, residual = step.add_(deflated.direction, size), residual.add_(deflated.image, -size)
            slope, taken = -size * along, 1
        direction: Vector | None = None
        first = before = 0.0
        for number in range(steps):
            moved = Vector(precondition.bank(residual.bank), precondition.codes(residual.codes))
            strength = residual.dot(moved)
            first = strength if number == 0 else first
            if not strength > _RESIDUAL**2 * first * (number > 0):
                break
            moved = moved if deflated is None else deflated.without(moved)
            direction = moved if direction is None else direction.scale_(strength / before).add_(moved, 1.0)
            del moved
            image = operator(direction)
            curvature = direction.dot(image)
            taken += 1
            if not curvature > 0:  # rounding has the last word
                break
            size, before = strength / curvature, strength
            step, residual = step.add_(direction, size), residual.add_(image, -size)
            slope -= size * strength
            del image
    return Newton(step, slope, taken)


@dataclass(frozen=True)
class _Deflated:
    """A direction s that was searched, H s, and sᵀ H s."""

    direction: Vector
    image: Vector
    curvature: float

    @staticmethod
    def of(direction: Vector | None, operator: Operator) -> _Deflated | None:
        if direction is None:
            return None
        image = operator(direction)
        curvature = direction.dot(image)
        return _Deflated(direction, image, curvature) if curvature > 0 else None

    def without(self, vector: Vector) -> Vector:
        """The vector made conjugate to the direction, in place."""
        return vector.add_(self.direction, -vector.dot(self.image) / self.curvature)
