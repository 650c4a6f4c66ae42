"""Gauss-Newton steps against dense fp64 algebra: the operator, its preconditioner, and what the gradients solve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dense import ATOMS, CASES, EXPERTS, RANK, WHOLE, D, dense_of, problem_of, random_metric, random_point, small_family
from families import CPU, Array, make_family, silent
from forms import Serial, form
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.passes import engine
from globe.fit import gauss_newton
from globe.fit import preconditioner as preconditioner_module
from globe.fit import problem as problem_module
from globe.fit.gauss_newton import Newton, Operator, Point, Vector, newton_step
from globe.fit.objective import Value
from globe.fit.preconditioner import Preconditioner
from globe.fit.problem import Problem
from globe.statistics.metric import Metric

every_case = pytest.mark.parametrize(("kind", "rank"), CASES)
every_sign = pytest.mark.parametrize("signed", [True, False], ids=["signed", "non-negative"])
some_cases = pytest.mark.parametrize(
    ("kind", "rank", "signed"),
    [
        ("none", RANK, True),
        ("none", RANK, False),
        ("scaled", RANK, False),
        ("scaled", WHOLE, True),
        ("rows", WHOLE, False),
    ],
)
TO_THE_END = 600


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("newton"))


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "solver_dtype", lambda wanted, device: torch.bfloat16)


def flat(vector: Vector) -> Array:
    """fp64, the bank first."""
    return np.concatenate([vector.bank.double().numpy().ravel(), vector.codes.ravel()])


def vector_of(values: Array, rank: int) -> Vector:
    size = ATOMS * rank * D
    bank = torch.from_numpy(values[:size].astype(np.float32)).view(ATOMS, rank, D)
    return Vector(bank, values[size:].reshape(EXPERTS, ATOMS).copy())


def drawn(seed: int, rank: int) -> Array:
    """As fp32 has it."""
    size = ATOMS * rank * D + EXPERTS * ATOMS
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32).astype(np.float64)


def sparse_point(rank: int, signed: bool) -> Point:
    """A point; where codes are non-negative some are zero."""
    bank, codes = random_point(signed=signed, rank=rank)
    if not signed:
        codes[np.random.default_rng(0).random(codes.shape) < 0.3] = 0
        codes[:, 0] += 0.1
    return Point(bank, codes, signed)


def problem_at(family: Family, metric: Metric | None, point: Point, *, experts: int = 4) -> tuple[Problem, Value]:
    """The problem after a pass at the point, and what it found."""
    problem = problem_of(family, metric, shape=tuple(point.bank.shape), blocks=Blocks(experts=experts))  # type: ignore[arg-type]
    return problem, problem.look(point.bank, point.codes, 0, silent)


def by_codes(family: Family, metric: Metric | None, point: Point) -> Array:
    """2 JᵀJ / Σ_i ‖W'_i‖², J by the bank and the codes themselves."""
    dense = dense_of(family, metric)
    both = torch.cat(dense.jacobian(point.bank.double(), torch.from_numpy(point.codes)), 1)
    found: Array = (2 * both.mT @ both / dense.energy).numpy()
    return found


def by_variables(family: Family, metric: Metric | None, point: Point) -> Array:
    """The same by the bank and the codes' variables."""
    chain = np.concatenate([np.ones(point.bank.numel()), point.chain.ravel()])
    return by_codes(family, metric, point) * np.outer(chain, chain)


def apply(problem: Problem, point: Point, value: Value, values: Array) -> Array:
    with engine(problem.device) as workers:
        return flat(Operator(problem, point, value.scale, workers)(vector_of(values, point.bank.shape[1])))


def close(found: Array, wanted: Array, tolerance: float) -> None:
    distance = np.linalg.norm(found - wanted)
    assert distance <= tolerance * np.linalg.norm(wanted), distance


@every_case
@every_sign
def test_the_operator_is_the_gauss_newton_matrix(signed: bool, kind: str, rank: int, family: Family) -> None:
    metric, point = random_metric(kind), sparse_point(rank, signed)
    problem, value = problem_at(family, metric, point)
    wanted = by_variables(family, metric, point)
    for seed in range(3):
        values = drawn(seed, rank)
        close(apply(problem, point, value, values), wanted @ values, 1e-4)
    size = point.bank.numel()
    for part in (slice(0, size), slice(size, None)):  # each block alone
        values = np.zeros(len(wanted))
        values[part] = drawn(5, rank)[part]
        close(apply(problem, point, value, values), wanted @ values, 1e-4)


@every_case
def test_in_bf16_the_operator_is_off_by_rounding(kind: str, rank: int, family: Family, bf16: None) -> None:
    metric, point = random_metric(kind), sparse_point(rank, True)
    problem, value = problem_at(family, metric, point)
    close(apply(problem, point, value, drawn(0, rank)), by_variables(family, metric, point) @ drawn(0, rank), 0.03)


@every_case
def test_steps_in_bf16_lower_f_as_far(kind: str, rank: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    point, errors = sparse_point(rank, True), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(problem_module, "solver_dtype", lambda wanted, device, dtype=dtype: dtype)
        problem, value = problem_at(family, random_metric(kind), point)
        step = newton_step(problem, point, value, None, 5).step
        errors.append(problem.look(point.bank + 0.1 * step.bank, point.moved(step.codes, 0.1), None, silent).error)
    assert errors[1] < value.error and value.error - errors[1] > 0.9 * (value.error - errors[0])


@every_case
def test_the_operator_is_symmetric_and_semidefinite(kind: str, rank: int, family: Family) -> None:
    point = sparse_point(rank, False)
    problem, value = problem_at(family, random_metric(kind), point)
    with engine(CPU) as workers:
        times = Operator(problem, point, value.scale, workers)
        matrix = np.stack([flat(times(vector_of(unit, rank))) for unit in np.eye(len(drawn(0, rank)))])
    close(matrix, matrix.T, 1e-5)
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert eigenvalues[0] > -1e-5 * eigenvalues[-1]
    off = np.flatnonzero(np.concatenate([np.ones(point.bank.numel()), point.chain.ravel()]) == 0)
    assert len(off) and not matrix[off].any() and not matrix[:, off].any()


@every_case
def test_what_costs_nothing_has_no_curvature(kind: str, rank: int, family: Family) -> None:
    """f does not change under B_j → Q B_j, nor with the size of an expert's codes."""
    point = sparse_point(rank, True)
    problem, value = problem_at(family, random_metric(kind), point)
    turn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(1))
    usual = flat(vector_of(drawn(0, rank), rank))
    size = np.linalg.norm(apply(problem, point, value, usual)) / np.linalg.norm(usual)
    for free in (
        Vector(turn @ point.bank, np.zeros_like(point.codes)),
        Vector(torch.zeros_like(point.bank), point.codes * np.arange(1, EXPERTS + 1)[:, None]),
    ):
        assert np.linalg.norm(apply(problem, point, value, flat(free))) < 1e-4 * size * np.linalg.norm(flat(free))


def test_at_an_exact_fit_it_is_the_hessian(tmp_path: Path) -> None:
    """There the terms that are left out are zero."""
    bank, codes = random_point(signed=True)
    random = np.random.default_rng(1)
    weights = random.standard_normal((EXPERTS, 10, RANK)) @ np.einsum("ij,jrd->ird", codes, bank.double().numpy())
    family, point = make_family(tmp_path, weights), Point(bank, codes, True)
    problem, value = problem_at(family, None, point)
    dense = dense_of(family, None)
    values = vector_of(drawn(0, RANK), RANK)

    def shares(bank: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return dense.shares(bank, codes).sum()

    at = bank.double(), torch.from_numpy(codes)
    _, products = torch.autograd.functional.hvp(shares, at, (values.bank.double(), torch.from_numpy(values.codes)))  # type: ignore[no-untyped-call]
    close(apply(problem, point, value, flat(values)), torch.cat([part.flatten() for part in products]).numpy(), 1e-4)


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


@pytest.mark.parametrize("kind", ["shared", "scaled", "own", "rows"])
@pytest.mark.parametrize("rank", [RANK, WHOLE])
def test_both_forms_of_the_columns_agree(rank: int, kind: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, point = random_metric(kind), sparse_point(rank, False)
    values, found = drawn(1, rank), []
    for whole in (True, False):
        monkeypatch.setattr(problem_module, "keeps_columns", lambda *given, whole=whole: whole)
        problem, value = problem_at(family, metric, point)
        assert problem.whole == whole
        step = newton_step(problem, point, value, None, 6)
        problem, value = problem_at(family, metric, point)
        found.append((value, apply(problem, point, value, values), step))
    (one, product, step), (other, same, again) = found
    assert one.error == pytest.approx(other.error, rel=1e-6)
    for name in ("bank", "lefts", "columns", "curvature", "gram"):
        close(getattr(one, name).double().numpy(), getattr(other, name).double().numpy(), 1e-5)
    close(product, same, 1e-4)
    close(flat(step.step), flat(again.step), 2e-2)
    assert step.slope == pytest.approx(again.slope, rel=1e-3)


@every_case
def test_batches_shelves_and_forms_change_rounding_only(kind: str, rank: int, family: Family, tmp_path: Path) -> None:
    point, values = sparse_point(rank, False), drawn(1, rank)
    problem, value = problem_at(family, random_metric(kind), point)
    wanted = apply(problem, point, value, values)
    for experts in (1, 32):
        problem, value = problem_at(family, random_metric(kind), point, experts=experts)
        close(apply(problem, point, value, values), wanted, 1e-6)
    stored = problem_of(
        family,
        random_metric(kind),
        shape=tuple(point.bank.shape),  # type: ignore[arg-type]
        blocks=Blocks(experts=4, cached=0),
        folder=tmp_path,
    )
    value = stored.look(point.bank, point.codes, 0, silent)
    assert np.array_equal(apply(stored, point, value, values), wanted)
    for name in ("batched", "batched in fp32"):
        with form(name):
            problem, value = problem_at(family, random_metric(kind), point)
            close(apply(problem, point, value, values), wanted, 1e-3)


def dense_preconditioner(value: Value, codes: Array, chain: Array, weighed: bool) -> tuple[Array, list[Array]]:
    """S (R ⊗ I) Sᵀ ⊗ K of the bank (m r d, m r d), and the blocks of the codes on their support."""
    lefts = value.lefts.double().numpy()
    atoms, rank, _ = lefts.shape
    lefts = lefts + 1e-4 * np.trace(lefts, axis1=1, axis2=2)[:, None, None] / rank * np.eye(rank)
    roots = np.linalg.cholesky(lefts)
    coupling = codes.T @ (value.weights[:, None] * codes)
    coupling /= np.sqrt(np.outer(np.diag(coupling), np.diag(coupling)))
    coupling += 1e-2 * np.eye(atoms)
    whole = np.einsum("jab,jk,kcb->jakc", roots, coupling, roots).reshape(atoms * rank, atoms * rank)
    columns = value.columns.numpy() + 1e-3 * np.eye(len(value.columns)) if weighed else np.eye(len(value.columns))
    blocks = []
    for block, slopes in zip(value.curvature.double().numpy(), chain, strict=True):
        some = np.flatnonzero(slopes)
        inner = block[np.ix_(some, some)] * np.outer(slopes[some], slopes[some])
        blocks.append(inner + 1e-2 * np.trace(inner) / max(len(some), 1) * np.eye(len(some)))
    return np.kron(whole, columns), blocks


def dense_inverse(value: Value, point: Point, weighed: bool) -> Array:
    """The inverse of both parts together; zero where a code has no variable."""
    bank, blocks = dense_preconditioner(value, point.codes, point.chain, weighed)
    size = len(bank) + EXPERTS * ATOMS
    inverse = np.zeros((size, size))
    inverse[: len(bank), : len(bank)] = np.linalg.inv(bank)
    for number, block in enumerate(blocks):
        some = len(bank) + ATOMS * number + np.flatnonzero(point.chain[number])
        inverse[np.ix_(some, some)] = np.linalg.inv(block)
    return inverse


@every_case
@every_sign
def test_the_preconditioner_is_the_inverse_of_its_blocks(signed: bool, kind: str, rank: int, family: Family) -> None:
    metric, point = random_metric(kind), sparse_point(rank, signed)
    value = problem_at(family, metric, point)[1]
    matrix, blocks = dense_preconditioner(value, point.codes, point.chain, metric is not None)
    found = Preconditioner(value, point.codes, point.chain, metric is not None, Serial())
    given = vector_of(drawn(3, rank), rank)
    bank = found.bank(given.bank)
    close(matrix @ bank.double().numpy().ravel(), given.bank.double().numpy().ravel(), 1e-2)
    codes = found.codes(given.codes)
    for number, block in enumerate(blocks):
        some = np.flatnonzero(point.chain[number])
        np.testing.assert_allclose(block @ codes[number, some], given.codes[number, some], rtol=1e-6, atol=1e-8)
        assert np.count_nonzero(codes[number]) == len(some)


@every_case
def test_the_preconditioner_is_symmetric_and_positive_definite(kind: str, rank: int, family: Family) -> None:
    metric, point = random_metric(kind), sparse_point(rank, False)
    value = problem_at(family, metric, point)[1]
    found = Preconditioner(value, point.codes, point.chain, metric is not None, Serial())
    size = point.bank.numel()
    columns = []
    for unit in np.eye(len(drawn(0, rank))):
        part = vector_of(unit, rank)
        columns.append(flat(Vector(found.bank(part.bank), found.codes(part.codes))))
    matrix = np.stack(columns)
    close(matrix, matrix.T, 1e-5)
    active = np.concatenate([np.ones(size, bool), point.chain.ravel() > 0])
    assert not matrix[~active].any() and not matrix[:size, size:].any()
    assert np.linalg.eigvalsh((matrix + matrix.T)[np.ix_(active, active)])[0] > 0


@pytest.mark.parametrize("kind", ["none", "shared"])
def test_it_is_exact_where_experts_are_alike(kind: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """All C_i and K_i equal: but for damping the bank's part is the inverse of that of the operator."""
    for name in ("_LEFT_DAMPING", "_COUPLING_DAMPING", "_COLUMN_DAMPING"):
        monkeypatch.setattr(preconditioner_module, name, 0.0)
    metric, point = random_metric(kind), sparse_point(WHOLE, False)
    problem, value = problem_at(family, metric, point)
    random = np.random.default_rng(6)
    left, moment = (
        torch.from_numpy(root @ root.T / len(root) + 0.3 * np.eye(len(root))).float()
        for root in (random.standard_normal((WHOLE, WHOLE)), random.standard_normal((D, D)))
    )
    problem.lefts.put(slice(0, EXPERTS), left.expand(EXPERTS, -1, -1))
    if metric is None:  # a basis of nothing: K_i = I
        moment = torch.eye(D)
        problem.hidden.put(slice(0, EXPERTS), torch.zeros(EXPERTS, WHOLE, D))
    else:
        problem.hidden.put(slice(0, EXPERTS), moment.expand(EXPERTS, -1, -1))
    mean = float(moment.diagonal().mean())
    sizes = torch.from_numpy(np.square(point.codes).sum(0)).float()
    alike = Value(
        value.error,
        value.bank,
        value.codes,
        value.errors,
        0,
        value.scale,
        2 * value.scale * mean * sizes[:, None, None] * left,
        np.full(EXPERTS, mean * float(left.trace())),
        (moment / mean).double(),
        value.curvature,
        value.gram,
    )
    precondition = Preconditioner(alike, point.codes, point.chain, metric is not None, Serial())
    direction = vector_of(drawn(8, WHOLE), WHOLE)
    direction.codes[:] = 0
    with engine(CPU) as workers:
        image = Operator(problem, point, value.scale, workers)(direction)
    close(precondition.bank(image.bank).numpy(), direction.bank.numpy(), 1e-2)


def test_the_preconditioner_passes_over_what_has_no_curvature() -> None:
    lefts, inner = torch.eye(2).repeat(3, 1, 1), torch.eye(3).repeat(2, 1, 1)
    lefts[1] = 0
    inner[0] = 0
    semidefinite = torch.diag(torch.tensor([1.0, 1.0, 0.0, -1e-12], dtype=torch.float64))
    nothing = torch.zeros(3, 2, 4)
    gram = torch.eye(2, dtype=torch.float64)
    codes = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    value = Value(0.0, nothing, np.zeros((2, 3)), np.zeros(2), 0, 1.0, lefts, np.ones(2), semidefinite, inner, gram)
    found = Preconditioner(value, codes, np.ones((2, 3)), True, Serial())
    given = Vector(torch.ones(3, 2, 4), np.ones((2, 3)))
    moved = Vector(found.bank(given.bank), found.codes(given.codes))
    assert bool(moved.bank.isfinite().all()) and np.isfinite(moved.codes).all()
    assert (moved.codes[0] == 0).all() and (moved.codes[1] > 0).all()
    assert moved.dot(given) > 0


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
