"""Gauss-Newton steps of the joint fit: conjugate gradients on the experts' own curvature, with no pass over W."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.gemm import correlations, matmul, mixtures, scatter_add
from globe.compute.passes import Engine, engine, within
from globe.fit.objective import Value
from globe.fit.preconditioner import Preconditioner
from globe.fit.problem import Problem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Vector:
    """A direction or a slope: a part for the bank (m, r, d; fp32) and one for the codes' variables (N, m; fp64)."""

    bank: torch.Tensor
    codes: Array

    def dot(self, other: Vector) -> float:
        """The inner product: of an atom in fp32, summed in fp64."""
        products = torch.stack(
            [torch.dot(a.flatten(), b.flatten()) for a, b in zip(self.bank, other.bank, strict=True)]
        )
        return float(products.cpu().double().sum()) + float((self.codes * other.codes).sum())

    def add_(self, other: Vector, factor: float) -> Vector:
        """This vector plus `factor` times the other, the bank in place."""
        return Vector(self.bank.add_(other.bank, alpha=factor), self.codes + factor * other.codes)


@dataclass(frozen=True)
class Point:
    """A bank and codes. The codes' variables are the codes where `signed`, else their roots on the support."""

    bank: torch.Tensor
    codes: Array
    signed: bool

    @property
    def variables(self) -> Array:
        """What the codes are functions of."""
        return self.codes if self.signed else np.sqrt(self.codes)

    @property
    def chain(self) -> Array:
        """Derivatives of the codes by their variables; zero off the support of non-negative codes, which stays."""
        return np.ones_like(self.codes) if self.signed else 2 * np.sqrt(self.codes)

    def moved(self, direction: Array, size: float) -> Array:
        """The codes `size` times a direction of their variables away."""
        variables = self.variables + size * direction
        return variables if self.signed else variables**2


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
        size = problem.spans[0].stop
        self._rooms = [torch.empty(size, *point.bank.shape[1:], device=point.bank.device) for _ in range(2)]

    def __call__(self, vector: Vector) -> Vector:
        """H times a vector."""
        found = self._apply(vector.bank, self._point.chain * vector.codes)
        return Vector(found.bank, found.codes * self._point.chain)

    def jump(self, codes: Array) -> Vector:
        """The same for a change of the codes (N, m) themselves, by the codes themselves."""
        return self._apply(None, codes)

    def _apply(self, change: torch.Tensor | None, codes: Array) -> Vector:
        problem, point = self._problem, self._point
        total, slopes = torch.zeros_like(point.bank), np.zeros_like(codes)
        lefts, hidden = problem.lefts.take(problem.spans), problem.hidden.take(problem.spans)
        for span, left, columns in zip(problem.spans, lefts, hidden, strict=True):
            mixed = mixtures(codes[span], point.bank, self._rooms[0])
            if change is not None:
                mixed += mixtures(point.codes[span], change, self._rooms[1])

            def work(
                part: slice,
                span: slice = span,
                mixed: torch.Tensor = mixed,
                left: torch.Tensor = left,
                columns: torch.Tensor = columns,
            ) -> None:
                mixed[part] = matmul(left[part], self._project(within(span, part), mixed[part], columns[part]))

            self._workers.run(work, span.stop - span.start)
            slopes[span] = correlations(mixed, point.bank)
            scatter_add(point.codes[span], mixed, total, self._rooms[1])
        return Vector(total.mul_(2 * self._scale), slopes * (2 * self._scale))

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
    jumped : float
        What the quadratic model says of f at the new codes before the step.
    predicted : float
        And after it.
    iterations : int
    """

    step: Vector
    slope: float
    jumped: float
    predicted: float
    iterations: int


@dataclass(frozen=True)
class Solving:
    """At most `steps` of conjugate gradients, fewer once the preconditioned residual is `tolerance` of the first."""

    steps: int
    tolerance: float


def newton_step(problem: Problem, point: Point, value: Value, target: Array, how: Solving) -> Newton:
    """argmin over (dB, dv) of the quadratic model of f, from new codes on, by preconditioned conjugate gradients.

    Parameters
    ----------
    problem : Problem
        Whose last pass was at the point.
    point : Point
    value : Value
        At the point. The memory of its bank is taken.
    target : array, shape (N, m)
        The codes that the step starts from, of a support of their own; those of the point for none.
    how : Solving
    """
    change = target - point.codes
    residual = Vector(value.bank, value.codes)
    with engine(problem.device) as workers:
        operator = Operator(problem, point, value.scale, workers)
        jumped = value.error
        after = Point(point.bank, target, point.signed)
        if change.any():
            raw = operator.jump(change)
            jumped += float((value.codes * change).sum()) + 0.5 * float((raw.codes * change).sum())
            residual = Vector(residual.bank.add_(raw.bank), residual.codes + raw.codes)
            del raw
        operator = Operator(problem, after, value.scale, workers)
        residual = Vector(residual.bank.neg_(), -residual.codes * after.chain)
        precondition = Preconditioner(value, after.codes, after.chain, problem.metric is not None)
        step = Vector(torch.zeros_like(point.bank), np.zeros_like(target))
        direction = _preconditioned(precondition, residual)
        strength = residual.dot(direction)
        first, slope, gained, taken = strength, 0.0, 0.0, 0
        for taken in range(1, how.steps + 1):
            image = operator(direction)
            curvature = direction.dot(image)
            if not curvature > 0:
                taken -= 1
                break
            size = strength / curvature
            step = step.add_(direction, size)
            slope -= size * strength
            gained += 0.5 * size * strength
            residual = residual.add_(image, -size)
            del image
            if taken == how.steps:
                break
            moved = _preconditioned(precondition, residual)
            before, strength = strength, residual.dot(moved)
            if strength <= how.tolerance**2 * first:
                break
            direction = Vector(
                direction.bank.mul_(strength / before).add_(moved.bank),
                direction.codes * (strength / before) + moved.codes,
            )
            del moved
    return Newton(step, slope, jumped, jumped - gained, taken)


def _preconditioned(precondition: Preconditioner, vector: Vector) -> Vector:
    return Vector(precondition.bank(vector.bank), precondition.codes(vector.codes))
