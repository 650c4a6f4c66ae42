"""L-BFGS directions on quadratics, against a dense recursion, and the preconditioner against its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import Array
from globe.fit.quasi_newton import Pairs, Point, Preconditioner, Vector
from globe.fit.variable_projection import Curvature, Value

BANK = (2, 1, 3)
WHOLE = 6  # numbers of the bank in a vector


def vector(values: Array) -> Vector:
    """The first six numbers are the bank's, as bf16 has them; the others are the codes'."""
    return exact(values).rounded().copy()


def exact(values: Array) -> Vector:
    bank = torch.from_numpy(values[:WHOLE].astype(np.float32)).view(BANK)
    return Vector(bank, values[None, WHOLE:].astype(np.float64))


def flat(found: Vector) -> Array:
    return np.concatenate([found.bank.double().numpy().ravel(), found.codes.ravel()])


def spd(seed: int, size: int) -> Array:
    random = np.random.default_rng(seed)
    root = random.standard_normal((size, size))
    return root @ root.T / size + 0.3 * np.eye(size)


def same(found: Vector) -> Vector:
    return found


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_conjugate_pairs_give_the_newton_direction(seed: int, extra: int) -> None:
    size = WHOLE + extra
    hessian, random = spd(seed, size), np.random.default_rng(seed)
    steps = np.linalg.inv(np.linalg.cholesky(hessian)).T  # Sᵀ H S = I
    pairs = Pairs(size)
    for step in steps.T * random.uniform(0.1, 10, (size, 1)):
        pairs.add(vector(step), vector(hessian @ step))
    assert len(pairs) == size
    slope = random.standard_normal(size)
    given_slope = vector(slope)
    found = flat(pairs.direction(given_slope, same))
    wanted = -np.linalg.solve(hessian, flat(given_slope))
    assert np.linalg.norm(found - wanted) <= 5e-2 * np.linalg.norm(wanted)  # the pairs are conjugate to bf16 only


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_directions_are_those_of_the_dense_recursion(seed: int, count: int) -> None:
    size = WHOLE + 3
    random, hessian, metric = np.random.default_rng(seed), spd(seed, size), spd(seed + 1, size)
    pairs, history = Pairs(count), []
    for _ in range(count + 2):  # the first two are forgotten
        step = random.standard_normal(size)
        change = hessian @ step + 0.05 * random.standard_normal(size)
        if step @ change > 0.1:
            pairs.add(vector(step), vector(change))
            history.append((flat(vector(step)), flat(vector(change))))
    history = history[-count:]
    scale = 0.5
    if history:
        step, change = history[-1]
        scale = step @ change / (change @ metric @ change)
    inverse = scale * metric
    for step, change in history:
        rho = 1 / (step @ change)
        left = np.eye(size) - rho * np.outer(step, change)
        inverse = left @ inverse @ left.T + rho * np.outer(step, step)
    slope = random.standard_normal(size)
    given_slope = vector(slope)
    before = flat(given_slope)
    found = flat(pairs.direction(given_slope, lambda other: exact(metric @ flat(other))))
    assert np.linalg.norm(found + inverse @ before) <= 1e-3 * np.linalg.norm(inverse @ before)
    assert np.array_equal(flat(given_slope), before)


def test_pairs_without_curvature_are_not_taken() -> None:
    random, pairs = np.random.default_rng(0), Pairs(3)
    step = random.standard_normal(9)
    across = random.standard_normal(9)
    across -= across @ step / (step @ step) * step
    for change in (-step, 0 * step, across - 1e-6 * step, np.full(9, np.nan)):
        pairs.add(vector(step), vector(change))
    pairs.add(vector(0 * step), vector(step))
    assert len(pairs) == 0
    for factor in (1.0, 2.0, 3.0, 4.0):
        pairs.add(vector(step), vector(factor * step))
    assert [round(float(slope.dot(vector(step)) / (step @ step))) for slope in pairs.slopes] == [2, 3, 4]
    pairs.clear()
    assert len(pairs) == 0


def test_other_coordinates_change_no_inner_product() -> None:
    generator = torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)

    def draw() -> Vector:
        return Vector(torch.randn(3, 4, 5, generator=generator), random.standard_normal((2, 3)))

    pairs = Pairs(4)
    for _ in range(3):
        pairs.steps.append(draw())
        pairs.slopes.append(draw())
    before = [[step.dot(slope) for slope in pairs.slopes] for step in pairs.steps]
    turn = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=generator)
    pairs.move(turn, torch.linalg.inv(turn).mT.contiguous())
    pairs.resize(random.uniform(0.1, 10, (2, 1)))
    after = [[step.dot(slope) for slope in pairs.slopes] for step in pairs.steps]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_slopes_are_those_of_the_variables(signed: bool) -> None:
    random = np.random.default_rng(0)
    codes = random.standard_normal((3, 4)) if signed else random.uniform(0.1, 1, (3, 4)) * (random.random((3, 4)) < 0.6)
    bank, wanted = torch.zeros(4, 2, 5), random.standard_normal((3, 4))
    point, direction = Point(bank, codes, signed), Vector(torch.zeros(4, 2, 5), random.standard_normal((3, 4)))
    np.testing.assert_allclose(point.moved(direction, 0.0).codes, codes)
    value = Value(0.0, bank, wanted, np.zeros(3), 0)
    ends = [float((point.moved(direction, s).codes * wanted).sum()) for s in (1e-6, -1e-6)]
    slope = point.slope(value)
    on_support = Vector(0 * bank, np.where(codes != 0, direction.codes, 0))
    assert slope.dot(on_support) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)
    if not signed:  # a step past zero comes out on the other side
        assert point.moved(direction, 100.0).codes.min() >= 0


@pytest.mark.parametrize("weigh_columns", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_the_preconditioner_is_the_inverse_of_its_blocks(weigh_columns: bool, signed: bool) -> None:
    atoms, rank, d, experts = 3, 4, 6, 2
    lefts = torch.from_numpy(np.stack([spd(k, rank) for k in range(atoms)])).float()
    columns = torch.from_numpy(spd(9, d))
    inner = torch.from_numpy(np.stack([spd(20 + k, atoms) for k in range(experts)])).float()
    curvature = Curvature(lefts.clone(), columns, inner, torch.eye(rank, dtype=torch.float64))
    random = np.random.default_rng(0)
    codes = random.standard_normal((experts, atoms)) if signed else random.uniform(0.1, 1, (experts, atoms))
    if not signed:
        codes[0, 1] = 0
    point = Point(torch.zeros(atoms, rank, d), codes, signed)
    given_vector = Vector(
        torch.from_numpy(random.standard_normal((atoms, rank, d))).float(), random.standard_normal((experts, atoms))
    )
    found = Preconditioner(curvature, weigh_columns)(given_vector.copy(), point)
    for atom in range(atoms):
        left = lefts[atom].double().numpy()
        left = left + 1e-4 * left.diagonal().mean() * np.eye(rank)
        right = columns.numpy() + 1e-3 * np.eye(d) if weigh_columns else np.eye(d)
        back = left @ found.bank[atom].double().numpy() @ right
        np.testing.assert_allclose(back, given_vector.bank[atom].double().numpy(), atol=1e-4)
    for number in range(experts):
        some = np.flatnonzero(codes[number])
        chain = np.ones(len(some)) if signed else 2 * np.sqrt(codes[number, some])
        block = inner[number].double().numpy()[np.ix_(some, some)] * np.outer(chain, chain)
        block += 1e-2 * block.diagonal().mean() * np.eye(len(some))
        np.testing.assert_allclose(block @ found.codes[number, some], given_vector.codes[number, some], atol=1e-8)
        assert np.count_nonzero(found.codes[number]) == len(some)


def test_the_preconditioner_passes_over_what_has_no_curvature() -> None:
    lefts, inner = torch.eye(2).repeat(3, 1, 1), torch.eye(3).repeat(2, 1, 1)
    lefts[1] = 0
    inner[0] = 0
    semidefinite = torch.diag(torch.tensor([1.0, 1.0, 0.0, -1e-12], dtype=torch.float64))
    curvature = Curvature(lefts, semidefinite, inner, torch.eye(2, dtype=torch.float64))
    point = Point(torch.zeros(3, 2, 4), np.ones((2, 3)), True)
    vector = Vector(torch.ones(3, 2, 4), np.ones((2, 3)))
    found = Preconditioner(curvature, True)(vector.copy(), point)
    assert bool(found.bank.isfinite().all()) and np.isfinite(found.codes).all()
    assert (found.codes[0] == 0).all() and (found.codes[1] > 0).all()
    assert found.dot(vector) > 0
