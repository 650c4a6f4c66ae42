"""Gauss-Newton steps against dense fp64 algebra: what the gradients solve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dense import EXPERTS, RANK, D, random_metric, random_point
from families import Array, make_family, silent
from forms import form
from globe.checkpoint.family import Family
from globe.fit import gauss_newton
from globe.fit import problem as problem_module
from globe.fit.gauss_newton import Newton, newton_step
from globe.fit.objective import Value
from globe.fit.point import Point, Vector
from globe.fit.preconditioner import Preconditioner
from globe.statistics.metric import Metric
from newton import (
    by_variables,
    close,
    dense_inverse,
    drawn,
    every_case,
    flat,
    problem_at,
    some_cases,
    sparse_point,
    vector_of,
)

TO_THE_END = 600


@every_case
def test_steps_in_bf16_lower_f_as_far(kind: str, rank: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    point, errors = sparse_point(rank, True), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(problem_module, "solver_dtype", lambda wanted, device, dtype=dtype: dtype)
        problem, value = problem_at(family, random_metric(kind), point)
        step = newton_step(problem, point, value, None, 5).step
        errors.append(problem.look(point.bank + 0.1 * step.bank, point.moved(step.codes, 0.1), None, silent).error)
    assert errors[1] < value.error and value.error - errors[1] > 0.9 * (value.error - errors[0])


def whole_step(
    family: Family, metric: Metric | None, point: Point, previous: Vector | None = None, steps: int = TO_THE_END
) -> tuple[Newton, Value, Array]:
    """A step, f at its beginning, and the gradient there by the bank and the variables."""
    with form("batched"):  # which starts no threads
        problem, value = problem_at(family, metric, point)
        slope = np.concatenate([value.bank.double().numpy().ravel(), (value.codes * point.chain).ravel()])
        return newton_step(problem, point, value, previous, steps), value, slope


@some_cases
def test_a_step_is_that_of_the_dense_equations(
    kind: str, rank: int, signed: bool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauss_newton, "_RESIDUAL", 1e-3)
    metric, point = random_metric(kind), sparse_point(rank, signed)
    found, value, slope = whole_step(family, metric, point)
    matrix = by_variables(family, metric, point)
    wanted = -np.linalg.lstsq(matrix, slope, rcond=1e-9)[0]
    step = flat(found.step)
    assert 1 < found.iterations < TO_THE_END
    close(matrix @ step, -slope, 5e-3)  # of a singular matrix: steps differ by what costs nothing
    assert found.slope == pytest.approx(slope @ step, rel=1e-3)
    assert slope @ step + step @ matrix @ step / 2 == pytest.approx(slope @ wanted / 2, abs=2e-3 * value.error)
    assert not found.step.codes[point.chain == 0].any()


@some_cases
@pytest.mark.parametrize("before", [False, True], ids=["the first", "after another"])
def test_iterations_are_those_of_dense_conjugate_gradients(
    before: bool, kind: str, rank: int, signed: bool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauss_newton, "_RESIDUAL", 0.0)
    metric, point = random_metric(kind), sparse_point(rank, signed)
    previous = vector_of(drawn(11, rank), rank) if before else None
    if previous is not None:
        previous.codes[point.chain == 0] = 0
    found, _, slope = whole_step(family, metric, point, previous, 5)
    assert found.iterations == 5 + before
    matrix = by_variables(family, metric, point)
    value = problem_at(family, metric, point)[1]
    inverse = dense_inverse(value, point, metric is not None)
    direction = flat(previous) if previous is not None else None
    wanted = conjugate_gradients(matrix, -slope, inverse, direction, 5)
    close(flat(found.step), wanted, 2e-2)
    assert found.slope == pytest.approx(slope @ wanted, rel=1e-2)
    if direction is not None:  # nothing is left to do along it
        left = abs((matrix @ flat(found.step) + slope) @ direction)
        assert left <= 1e-3 * np.linalg.norm(direction) * np.linalg.norm(slope)


def conjugate_gradients(matrix: Array, right: Array, inverse: Array, previous: Array | None, steps: int) -> Array:
    """What steps of them find that begin with the best multiple of another direction, and stay conjugate to it."""
    found, residual, conjugate = np.zeros_like(right), right, np.eye(len(right))
    if previous is not None:
        image = matrix @ previous
        found = right @ previous / (previous @ image) * previous
        residual = right - matrix @ found
        conjugate = conjugate - np.outer(previous, image) / (previous @ image)
    direction, strength = conjugate @ inverse @ residual, residual @ inverse @ residual
    for _ in range(steps):
        size = strength / (direction @ matrix @ direction)
        found, residual = found + size * direction, residual - size * matrix @ direction
        last, strength = strength, residual @ inverse @ residual
        direction = conjugate @ inverse @ residual + strength / last * direction
    return found


def test_a_direction_without_curvature_is_no_step_before(family: Family) -> None:
    metric, point = random_metric("scaled"), sparse_point(RANK, False)
    nothing = Vector(torch.zeros_like(point.bank), np.zeros_like(point.codes))
    alone, other = (whole_step(family, metric, point, previous, 4)[0] for previous in (None, nothing))
    assert (alone.slope, alone.iterations) == (other.slope, other.iterations)
    assert np.array_equal(flat(alone.step), flat(other.step))


def test_iterations_end_where_they_are_told_to(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, point = random_metric("scaled"), sparse_point(RANK, False)
    matrix, models, taken = by_variables(family, metric, point), [0.0], []
    monkeypatch.setattr(gauss_newton, "_RESIDUAL", 0.0)
    for steps in (1, 3, 8):
        found, _, slope = whole_step(family, metric, point, None, steps)
        step = flat(found.step)
        models.append(slope @ step + step @ matrix @ step / 2)
        assert found.iterations == steps and found.slope < 0
    assert models == sorted(models, reverse=True) and len(set(models)) == 4
    for residual in (0.5, 0.01):
        monkeypatch.setattr(gauss_newton, "_RESIDUAL", residual)
        taken.append(whole_step(family, metric, point, None, 100)[0].iterations)
    assert 1 <= taken[0] < taken[1] < 100


def test_a_minimum_takes_no_step(tmp_path: Path) -> None:
    """Nothing of W is left, and nothing has a slope."""
    bank, codes = random_point(signed=False)
    family = make_family(tmp_path, np.zeros((EXPERTS, 10, D)))
    found, value, _ = whole_step(family, None, Point(bank, codes, False))
    assert (found.iterations, found.slope, value.error) == (0, 0.0, 0.0)
    assert not found.step.bank.any() and not found.step.codes.any()


@some_cases
def test_it_saves_iterations(
    kind: str, rank: int, signed: bool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauss_newton, "_RESIDUAL", 0.0)
    metric, point = random_metric(kind), sparse_point(rank, signed)
    matrix, models = by_variables(family, metric, point), []
    for _ in range(2):
        found, _, slope = whole_step(family, metric, point, None, 8)
        step = flat(found.step)
        models.append(slope @ step + step @ matrix @ step / 2)
        monkeypatch.setattr(Preconditioner, "bank", lambda _, slope: slope.clone())
        monkeypatch.setattr(Preconditioner, "codes", lambda _, slope: slope)
    assert models[0] < models[1] < 0


def test_moves_of_variables_are_those_of_their_slopes() -> None:
    random = np.random.default_rng(0)
    for signed in (True, False):
        codes = random.standard_normal((3, 4))
        if not signed:
            codes = abs(codes) * (random.random((3, 4)) < 0.6)
        point, direction = Point(torch.zeros(4, 2, 5), codes, signed), random.standard_normal((3, 4))
        np.testing.assert_allclose(point.moved(direction, 0.0), codes, atol=1e-15)
        ends = [point.moved(direction, s) for s in (1e-6, -1e-6)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, point.chain * direction, rtol=1e-6, atol=1e-8)
        if not signed:  # a step past zero comes out on the other side
            assert point.moved(direction, 100.0).min() >= 0


def test_vectors_add_and_multiply() -> None:
    make: Callable[[int], Vector] = lambda seed: vector_of(drawn(seed, RANK), RANK)  # noqa: E731
    one, other = make(0), make(1)
    assert one.dot(other) == pytest.approx(drawn(0, RANK) @ drawn(1, RANK), rel=1e-5)
    np.testing.assert_allclose(flat(one.add_(other, -0.5)), drawn(0, RANK) - 0.5 * drawn(1, RANK), atol=1e-6)
