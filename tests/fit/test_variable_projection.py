"""The objective without left factors against plain fp64 least squares, automatic derivatives and dense formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dense import ATOMS, EXPERTS, METRICS, RANK, D, dense_of, problem_of, random_metric, random_point, small_family
from families import make_family, make_job, planted, silent, whole_pool
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.devices import set_threads
from globe.fit import variable_projection
from globe.fit.quasi_newton import Point
from globe.fit.variable_projection import Problem, Value
from globe.settings import Settings

every_metric = pytest.mark.parametrize("kind", METRICS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("problem"))


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    distance = torch.linalg.vector_norm(found.double() - wanted)
    assert distance <= tolerance * torch.linalg.vector_norm(wanted), float(distance)


def same(one: Value, other: Value) -> bool:
    return (
        one.error == other.error
        and torch.equal(one.bank, other.bank)
        and np.array_equal(one.codes, other.codes)
        and np.array_equal(one.errors, other.errors)
    )


@every_metric
def test_value_is_that_of_least_squares(kind: str, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point()
    problem = problem_of(family, metric)
    found = problem.evaluate(bank, codes, silent)
    dense = dense_of(family, metric)
    seen, mixed = dense.seen.numpy(), dense.mixtures(bank.double(), torch.from_numpy(codes)).numpy()
    losses = [np.linalg.lstsq(b.T, w.T, rcond=None)[1].sum() for w, b in zip(seen, mixed, strict=True)]
    assert problem.energy == pytest.approx((seen**2).sum(), rel=1e-6)
    np.testing.assert_allclose(found.errors, np.array(losses) / (seen**2).sum(), rtol=1e-4)
    assert found.error == pytest.approx(found.errors.sum(), rel=1e-12)
    assert found.ridged == 0


@every_metric
def test_gradient_is_that_of_automatic_differentiation(kind: str, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point()
    found = problem_of(family, metric).evaluate(bank, codes, silent)
    leaves = bank.double().requires_grad_(), torch.from_numpy(codes).requires_grad_()
    dense_of(family, metric).shares(*leaves).sum().backward()
    for mine, leaf in zip((found.bank, torch.from_numpy(found.codes)), leaves, strict=True):
        assert leaf.grad is not None
        close(mine, leaf.grad, 1e-4)


@every_metric
def test_gradient_is_that_of_central_differences(kind: str, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(5)
    problem = problem_of(family, metric)
    found = problem.evaluate(bank, codes, silent)
    random = np.random.default_rng(0)
    step = 3e-3
    for _ in range(3):
        turn = torch.from_numpy(random.standard_normal(bank.shape).astype(np.float32))
        shift = random.standard_normal(codes.shape)
        ends = [problem.evaluate(bank + s * turn, codes + s * shift, silent).error for s in (step, -step)]
        slope = float((found.bank * turn).sum()) + float((found.codes * shift).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=2e-4)


@every_metric
def test_gradient_has_all_atoms_of_sparse_codes(kind: str, family: Family) -> None:
    bank, codes = random_point(signed=False)
    codes[:, 1:3] = 0
    found = problem_of(family, random_metric(kind)).evaluate(bank, codes, silent)
    assert (found.codes[:, 1:3] != 0).all() and (found.bank[1:3] == 0).all()
    assert np.array_equal(Point(bank, codes, False).slope(found).codes != 0, codes != 0)


@every_metric
@pytest.mark.parametrize("cached", [0, 1 << 30], ids=["read again", "cached"])
def test_later_passes_give_the_same(kind: str, cached: int, family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, random_metric(kind), cached=cached)
    first = problem.evaluate(bank, codes, silent)
    assert (problem._cached is not None) == bool(cached)
    assert all(same(first, problem.evaluate(bank, codes, silent)) for _ in range(2))
    value, _ = problem.curvature(bank, codes, 0, silent)
    assert same(first, value)


def test_the_cache_is_not_the_memory_that_is_read_into(family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, None, experts=1)  # in the checkpoint's own fp32, one after the other
    first = problem.evaluate(bank, codes, silent)
    assert same(first, problem.evaluate(bank, codes, silent))


def test_a_cache_that_does_not_hold_all_holds_none(family: Family) -> None:
    whole = 4 * EXPERTS * family.p * family.d
    assert problem_of(family, None, cached=whole - 1)._cached is None
    assert problem_of(family, None, cached=whole)._cached == []


@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_thread_count_changes_no_bit(kind: str, family: Family) -> None:
    bank, codes = random_point()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            set_threads(threads)
            found.append(problem_of(family, random_metric(kind)).curvature(bank, codes, 0, silent))
    finally:
        torch.set_num_threads(before)
    assert same(found[0][0], found[1][0])
    for name in ("lefts", "columns", "codes", "gram"):
        assert torch.equal(getattr(found[0][1], name), getattr(found[1][1], name)), name


@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_batches_change_rounding_only(kind: str, family: Family) -> None:
    bank, codes = random_point()
    whole = problem_of(family, random_metric(kind), experts=32).evaluate(bank, codes, silent)
    for experts in (1, 5):
        parts = problem_of(family, random_metric(kind), experts=experts).evaluate(bank, codes, silent)
        assert parts.error == pytest.approx(whole.error, rel=1e-12)
        close(parts.bank, whole.bank.double(), 1e-6)
        np.testing.assert_allclose(parts.codes, whole.codes, rtol=1e-5, atol=1e-7)


@every_metric
def test_curvature_is_that_of_the_dense_formulas(kind: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = random_metric(kind)
    bank, codes = random_point()
    monkeypatch.setattr(variable_projection, "_SKETCH", D)  # of orthonormal columns: nothing is left to chance
    monkeypatch.setattr(torch, "randn", lambda d, k, generator: D**0.5 * torch.eye(d, k))
    _, found = problem_of(family, metric).curvature(bank, codes, 0, silent)
    dense, alpha, atoms = dense_of(family, metric), torch.from_numpy(codes), bank.double()
    lefts, free, mixed = dense.lefts(atoms, alpha), dense.free(atoms, alpha), dense.mixtures(atoms, alpha)
    moments = free @ free.mT
    means = moments.diagonal(dim1=1, dim2=2).mean(1)
    grams = lefts.mT @ lefts
    close(found.lefts, 2 * torch.einsum("ij,i,ikl->jkl", alpha**2, means, grams) / dense.energy, 1e-4)
    columns = (lefts.square().sum((1, 2))[:, None, None] * moments).sum(0)
    close(found.columns, columns / columns.diagonal().mean(), 1e-4)
    moved = torch.einsum("ipr,jrd,idk->ijpk", lefts, atoms, free).flatten(2)
    fitted = (lefts @ mixed).square().sum((1, 2)) / alpha.square().sum(1)
    inner = moved @ moved.mT + 1e-3 * fitted[:, None, None] * torch.eye(ATOMS)
    close(found.codes, 2 * inner / dense.energy, 1e-4)
    squares = mixed @ mixed.mT
    close(found.gram, (squares / squares.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]).mean(0), 1e-5)


def test_codes_curvature_is_right_in_expectation(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variable_projection, "_SKETCH", 4096)
    bank, codes = random_point()
    problem, dense = problem_of(family, None), dense_of(family, None)
    found = problem.curvature(bank, codes, 0, silent)[1].codes
    alpha = torch.from_numpy(codes)
    lefts, free = dense.lefts(bank.double(), alpha), dense.free(bank.double(), alpha)
    moved = torch.einsum("ipr,jrd,idk->ijpk", lefts, bank.double(), free).flatten(2)
    close(found, 2 * moved @ moved.mT / dense.energy, 0.1)


def test_codes_curvature_is_the_hessian_at_an_exact_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, codes = random_point(signed=False)
    random = np.random.default_rng(1)
    weights = random.standard_normal((EXPERTS, 10, RANK)) @ np.einsum("ij,jrd->ird", codes, bank.double().numpy())
    family = make_family(tmp_path, weights)
    monkeypatch.setattr(variable_projection, "_SKETCH", D)
    monkeypatch.setattr(torch, "randn", lambda d, k, generator: D**0.5 * torch.eye(d, k))
    value, found = problem_of(family, None).curvature(bank, codes, 0, silent)
    assert value.error < 1e-10
    dense, alpha = dense_of(family, None), torch.from_numpy(codes)

    def share(mine: torch.Tensor) -> torch.Tensor:
        return dense.shares(bank.double(), torch.cat([mine[None], alpha[1:]]))[0]

    hessian = torch.autograd.functional.hessian(share, alpha[0])  # type: ignore[no-untyped-call]
    close(found.codes[0], hessian, 1e-2)  # but for what is added on the diagonal


@every_metric
def test_value_does_not_depend_on_the_atoms_coordinates(kind: str, family: Family) -> None:
    bank, codes = random_point()
    turn = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1))
    problem = problem_of(family, random_metric(kind))
    one, other = problem.evaluate(bank, codes, silent), problem.evaluate(turn @ bank, codes, silent)
    assert other.error == pytest.approx(one.error, rel=1e-4)
    np.testing.assert_allclose(other.codes, one.codes, atol=1e-4 * np.abs(one.codes).max())
    close(turn.mT @ other.bank, one.bank.double(), 1e-3)


@every_metric
def test_dependent_rows_take_a_ridge(kind: str, family: Family) -> None:
    bank, codes = random_point()
    bank[:, 1] = bank[:, 0]
    value, curvature = problem_of(family, random_metric(kind)).curvature(bank, codes, 0, silent)
    assert value.ridged == EXPERTS and 0 < value.error < 1
    parts = (value.bank, curvature.lefts, curvature.columns, curvature.codes, curvature.gram)
    assert all(bool(part.isfinite().all()) for part in parts)


def test_a_bank_beyond_fp32_is_no_fit_at_all(family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, random_metric("scaled"))
    value = problem.evaluate(bank * (3e38 / bank.abs().max()), 4 * codes, silent)
    assert value.error == float("inf") and np.isfinite(value.codes).all()
    far = problem.evaluate(bank * 1e25, codes, silent)
    assert far.error == pytest.approx(problem.evaluate(bank, codes, silent).error, rel=1e-5)


def test_a_dominating_direction_leaves_no_noise(tmp_path: Path) -> None:
    """Rows of condition 5,000: f is that of fp64, where a Gram matrix in fp32 is noise."""
    random = np.random.default_rng(0)
    weights, bank = random.standard_normal((4, 20, 30)), random.standard_normal((4, 4, 30))
    bank = (bank + 1e3 * random.standard_normal(30)).astype(np.float32)
    family = make_family(tmp_path, weights)
    value = Problem(whole_pool(family), make_job(Settings(), blocks=Blocks())).evaluate(
        torch.from_numpy(bank), np.eye(4), silent
    )
    weights = np.stack([family.read(number).double().numpy() for number in range(4)])
    fitted = [
        matrix @ np.linalg.pinv(atom) @ atom for matrix, atom in zip(weights, bank.astype(np.float64), strict=True)
    ]
    assert value.ridged == 0
    assert value.error == pytest.approx(np.square(weights - fitted).sum() / np.square(weights).sum(), rel=1e-6)


def test_experts_of_zeros(tmp_path: Path) -> None:
    weights = planted(0, experts=4, p=6, d=8, rank=2, atoms=3)
    weights[1] = 0
    bank, codes = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), np.ones((4, 3))
    problem = Problem(whole_pool(make_family(tmp_path / "some", weights)), make_job(Settings(), blocks=Blocks()))
    value, curvature = problem.curvature(bank, codes, 0, silent)
    assert value.errors[1] == 0 and value.error > 0 and bool((curvature.codes[1] == 0).all())
    nothing = Problem(whole_pool(make_family(tmp_path / "none", 0 * weights)), make_job(Settings(), blocks=Blocks()))
    value, curvature = nothing.curvature(bank, codes, 0, silent)
    assert value.error == 0 and bool((value.bank == 0).all()) and bool(curvature.columns.isfinite().all())


def test_progress_is_in_experts(family: Family) -> None:
    steps: list[float] = []
    problem_of(family, None).evaluate(*random_point(), steps.append)
    assert sum(steps) == EXPERTS
