"""The objective without left factors against plain fp64 least squares, automatic derivatives and dense formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dense import (
    ATOMS,
    CASES,
    EXPERTS,
    METRICS,
    RANK,
    WHOLE,
    D,
    dense_of,
    problem_of,
    random_metric,
    random_point,
)
from families import make_family, planted, silent
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.devices import set_threads
from globe.fit import problem as problem_module
from globe.fit import sketch
from globe.fit.objective import Value
from globe.fit.point import Point
from globe.fit.problem import Problem
from globe.statistics.metric import Metric

every_metric = pytest.mark.parametrize("kind", METRICS)
every_case = pytest.mark.parametrize(("kind", "rank"), CASES)
TENSORS = ("bank", "lefts", "columns", "curvature", "gram")
ARRAYS = ("codes", "errors", "weights")


@contextmanager
def full_sketch() -> Iterator[None]:
    """As many columns as there are, orthonormal: nothing is left to chance."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (sketch, problem_module):
            patch.setattr(module, "SKETCHED", D)
        patch.setattr(torch, "randn", lambda d, k, generator: D**0.5 * torch.eye(d, k))
        yield


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    distance = torch.linalg.vector_norm(found.double() - wanted)
    assert distance <= tolerance * torch.linalg.vector_norm(wanted), float(distance)


def same(one: Value, other: Value) -> bool:
    return (
        (one.error, one.scale, one.ridged) == (other.error, other.scale, other.ridged)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    )


def look(problem: Problem, bank: torch.Tensor, codes: np.ndarray) -> Value:
    return problem.look(bank, codes, 0, silent)


def kept(problem: Problem) -> list[torch.Tensor]:
    """C_i and K_i, or their bases."""
    return [
        torch.cat([part.clone() for part in shelf.take(problem.spans)]) for shelf in (problem.lefts, problem.hidden)
    ]


def problem_at(family: Family, metric: Metric | None, rank: int = RANK, **more: object) -> Problem:
    return problem_of(family, metric, shape=(ATOMS, rank, D), **more)  # type: ignore[arg-type]


@every_case
def test_value_is_that_of_least_squares(kind: str, rank: int, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(rank=rank)
    found = look(problem_at(family, metric, rank), bank, codes)
    dense = dense_of(family, metric)
    seen, mixed = dense.seen.numpy(), dense.mixtures(bank.double(), torch.from_numpy(codes)).numpy()
    losses = [np.linalg.lstsq(b.T, w.T, rcond=None)[1].sum() for w, b in zip(seen, mixed, strict=True)]
    assert 1 / found.scale == pytest.approx((seen**2).sum(), rel=1e-6)
    np.testing.assert_allclose(found.errors, np.array(losses) / (seen**2).sum(), rtol=1e-4)
    assert found.error == pytest.approx(found.errors.sum(), rel=1e-12)
    assert found.ridged == 0


@every_case
def test_gradient_is_that_of_automatic_differentiation(kind: str, rank: int, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(rank=rank)
    found = look(problem_at(family, metric, rank), bank, codes)
    leaves = bank.double().requires_grad_(), torch.from_numpy(codes).requires_grad_()
    dense_of(family, metric).shares(*leaves).sum().backward()
    for mine, leaf in zip((found.bank, torch.from_numpy(found.codes)), leaves, strict=True):
        assert leaf.grad is not None
        close(mine, leaf.grad, 2e-4)


@every_case
def test_gradient_is_that_of_central_differences(kind: str, rank: int, family: Family) -> None:
    bank, codes = random_point(5, rank=rank)
    problem = problem_at(family, random_metric(kind), rank)
    found = look(problem, bank, codes)
    random = np.random.default_rng(0)
    step = 3e-3
    for _ in range(3):
        turn = torch.from_numpy(random.standard_normal(bank.shape).astype(np.float32))
        shift = random.standard_normal(codes.shape)
        ends = [look(problem, bank + s * turn, codes + s * shift).error for s in (step, -step)]
        slope = float((found.bank * turn).sum()) + float((found.codes * shift).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=4e-4)


@every_metric
def test_gradient_has_all_atoms_of_sparse_codes(kind: str, family: Family) -> None:
    bank, codes = random_point(signed=False)
    codes[:, 1:3] = 0
    found = look(problem_of(family, random_metric(kind)), bank, codes)
    assert (found.codes[:, 1:3] != 0).all() and (found.bank[1:3] == 0).all()
    assert np.array_equal(Point(bank, codes, False).chain * found.codes != 0, codes != 0)


@every_case
def test_what_a_pass_leaves_of_each_expert(kind: str, rank: int, family: Family) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(rank=rank)
    problem = problem_at(family, metric, rank)
    look(problem, bank, codes)
    assert problem.whole == (kind != "none" and rank == WHOLE)
    dense, alpha = dense_of(family, metric), torch.from_numpy(codes)
    lefts, free, mixed = (made(bank.double(), alpha) for made in (dense.lefts, dense.free, dense.mixtures))
    grams, hidden = kept(problem)
    close(grams, lefts.mT @ lefts, 1e-4)
    if problem.whole:
        close(hidden, free @ free.mT, 1e-4)
    else:
        close(hidden @ hidden.mT, torch.eye(rank, dtype=torch.float64).expand(EXPERTS, -1, -1), 1e-5)
        close(hidden.mT @ hidden, torch.linalg.pinv(mixed) @ mixed, 1e-5)


@every_case
def test_later_passes_give_the_same(kind: str, rank: int, family: Family) -> None:
    bank, codes = random_point(rank=rank)
    problem = problem_at(family, random_metric(kind), rank)
    first = look(problem, bank, codes)
    shelves = kept(problem)
    look(problem, *random_point(9, rank=rank))
    assert same(first, look(problem, bank, codes))
    assert all(torch.equal(one, other) for one, other in zip(shelves, kept(problem), strict=True))


def test_a_first_pass_that_fails_makes_no_experts(family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, random_metric("scaled"))

    def broken(steps: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problem.look(bank, codes, 0, broken)
    assert same(look(problem, bank, codes), look(problem_of(family, random_metric("scaled")), bank, codes))


@every_case
@pytest.mark.parametrize("cached", ["nothing", "C_i alone", "all but W'_i"])
def test_shelves_on_disk_are_those_in_memory(kind: str, rank: int, cached: str, family: Family, tmp_path: Path) -> None:
    bank, codes = random_point(rank=rank)
    here = problem_at(family, random_metric(kind), rank)
    lefts = 4 * EXPERTS * rank * rank
    hidden = 4 * EXPERTS * D * (D if here.whole else rank)
    size = {"nothing": 0, "C_i alone": lefts, "all but W'_i": lefts + hidden}[cached]
    there = problem_at(family, random_metric(kind), rank, blocks=Blocks(experts=4, cached=size), folder=tmp_path)
    for seed in (3, 4):
        point = random_point(seed, rank=rank)
        assert same(look(here, *point), look(there, *point))
    assert same(look(here, bank, codes), look(there, bank, codes))
    assert all(torch.equal(one, other) for one, other in zip(kept(here), kept(there), strict=True))
    files = {"nothing": 3, "C_i alone": 2, "all but W'_i": 1}[cached]
    assert len(list(tmp_path.iterdir())) == files


def test_experts_are_not_the_memory_that_is_read_into(family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, None, blocks=Blocks(experts=1))  # in the checkpoint's own fp32, one after the other
    first = look(problem, bank, codes)
    assert same(first, look(problem, bank, codes))


@every_case
def test_thread_count_changes_no_bit(kind: str, rank: int, family: Family) -> None:
    bank, codes = random_point(rank=rank)
    found, shelves = [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            set_threads(threads)
            problem = problem_at(family, random_metric(kind), rank)
            found.append(look(problem, bank, codes))
            shelves.append(kept(problem))
    finally:
        torch.set_num_threads(before)
    assert same(*found)
    assert all(torch.equal(one, other) for one, other in zip(*shelves, strict=True))


@every_case
def test_batches_change_rounding_only(kind: str, rank: int, family: Family) -> None:
    bank, codes = random_point(rank=rank)
    whole = look(problem_at(family, random_metric(kind), rank, blocks=Blocks(experts=32)), bank, codes)
    for experts in (1, 5):
        parts = look(problem_at(family, random_metric(kind), rank, blocks=Blocks(experts=experts)), bank, codes)
        assert parts.error == pytest.approx(whole.error, rel=1e-12)
        for name in TENSORS:
            close(getattr(parts, name), getattr(whole, name).double(), 1e-6)
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-7)


@every_case
def test_sums_of_two_halves_are_those_of_the_whole(kind: str, rank: int, family: Family) -> None:
    point = random_point(rank=rank)
    problem = problem_at(family, random_metric(kind), rank, blocks=Blocks(experts=2))
    whole = problem.sums(*point, 0, silent).value()
    spans, halves = problem.spans, []
    for some in (spans[:1], spans[1:]):
        problem.spans = some
        halves.append(problem.sums(*point, 0, silent))
    assert halves[0].energies[2:].sum() == 0 and halves[1].energies[:2].sum() == 0
    assert halves[0].codes[2:].any() == halves[1].codes[:2].any() == halves[1].curvature[:2].any() == 0
    assert halves[0].sampled + halves[1].sampled == EXPERTS
    halves[0].merge(halves[1])
    found = halves[0].value()
    assert (found.error, found.scale, found.ridged) == (whole.error, whole.scale, whole.ridged)
    for name in TENSORS:
        close(getattr(found, name), getattr(whole, name).double(), 1e-6)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@every_case
@pytest.mark.parametrize("sample", [128, 3], ids=["all experts sampled", "every second"])
def test_curvature_is_that_of_the_dense_formulas(
    kind: str, rank: int, sample: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(rank=rank)
    monkeypatch.setattr(problem_module, "SAMPLED", sample)
    problem = problem_at(family, metric, rank)
    with full_sketch():
        found = look(problem, bank, codes)
    dense, alpha, atoms = dense_of(family, metric), torch.from_numpy(codes), bank.double()
    lefts, free, mixed = dense.lefts(atoms, alpha), dense.free(atoms, alpha), dense.mixtures(atoms, alpha)
    moments = free @ free.mT
    means = moments.diagonal(dim1=1, dim2=2).mean(1)
    grams = lefts.mT @ lefts
    traces = lefts.square().sum((1, 2))
    close(found.lefts, 2 * torch.einsum("ij,i,ikl->jkl", alpha**2, means, grams) / dense.energy, 1e-4)
    close(torch.from_numpy(found.weights), means * traces, 1e-4)
    some = slice(None, None, 2 if sample == 3 else 1)
    columns = (traces[:, None, None] * moments)[some].sum(0)
    if kind == "none":
        columns = torch.eye(D, dtype=torch.float64)  # which no one asks for
    close(found.columns, columns / columns.diagonal().mean(), 1e-4)
    moved = torch.einsum("ipr,jrd,idk->ijpk", lefts, atoms, free).flatten(2)
    fitted = (lefts @ mixed).square().sum((1, 2)) / alpha.square().sum(1)
    inner = moved @ moved.mT + 1e-3 * fitted[:, None, None] * torch.eye(ATOMS)
    close(found.curvature, 2 * inner / dense.energy, 1e-4)
    squares = mixed @ mixed.mT
    shares = squares / squares.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    close(found.gram, shares[some].mean(0), 1e-5)


@every_case
def test_the_sketch_is_right_in_expectation(
    kind: str, rank: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = random_metric(kind)
    bank, codes = random_point(rank=rank)
    problem, dense = problem_at(family, metric, rank), dense_of(family, metric)
    alpha = torch.from_numpy(codes)
    lefts, free = dense.lefts(bank.double(), alpha), dense.free(bank.double(), alpha)
    moved = torch.einsum("ipr,jrd,idk->ijpk", lefts, bank.double(), free).flatten(2)
    fitted = (lefts @ dense.mixtures(bank.double(), alpha)).square().sum((1, 2)) / alpha.square().sum(1)
    wanted = moved @ moved.mT + 1e-3 * fitted[:, None, None] * torch.eye(ATOMS)
    draws = [problem.look(bank, codes, seed, silent).curvature for seed in range(40)]
    assert not torch.equal(draws[0], draws[1])
    for module in (sketch, problem_module):
        monkeypatch.setattr(module, "SKETCHED", 4096)
    many = problem.look(bank, codes, 0, silent).curvature
    for found, tolerance in ((torch.stack(draws).mean(0), 0.2), (many, 0.1)):
        close(found, 2 * wanted / dense.energy, tolerance)


def test_codes_curvature_is_the_hessian_at_an_exact_fit(tmp_path: Path) -> None:
    bank, codes = random_point(signed=False)
    random = np.random.default_rng(1)
    weights = random.standard_normal((EXPERTS, 10, RANK)) @ np.einsum("ij,jrd->ird", codes, bank.double().numpy())
    family = make_family(tmp_path, weights)
    with full_sketch():
        found = look(problem_of(family, None), bank, codes)
    assert found.error < 1e-10
    dense, alpha = dense_of(family, None), torch.from_numpy(codes)

    def share(mine: torch.Tensor) -> torch.Tensor:
        return dense.shares(bank.double(), torch.cat([mine[None], alpha[1:]]))[0]

    hessian = torch.autograd.functional.hessian(share, alpha[0])  # type: ignore[no-untyped-call]
    close(found.curvature[0], hessian, 1e-2)  # but for what is added on the diagonal


@every_case
def test_value_does_not_depend_on_the_atoms_coordinates(kind: str, rank: int, family: Family) -> None:
    bank, codes = random_point(rank=rank)
    turn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(1))
    problem = problem_at(family, random_metric(kind), rank)
    one, other = look(problem, bank, codes), look(problem, turn @ bank, codes)
    assert other.error == pytest.approx(one.error, rel=1e-4)
    np.testing.assert_allclose(other.codes, one.codes, atol=1e-3 * np.abs(one.codes).max())
    close(turn.mT @ other.bank, one.bank.double(), 2e-3)


@every_metric
def test_dependent_rows_take_a_ridge(kind: str, family: Family) -> None:
    bank, codes = random_point()
    bank[:, 1] = bank[:, 0]
    problem = problem_of(family, random_metric(kind))
    value = look(problem, bank, codes)
    assert value.ridged == EXPERTS and 0 < value.error < 1
    parts = (*(getattr(value, name) for name in TENSORS), *kept(problem))
    assert all(bool(part.isfinite().all()) for part in parts)
    assert all(np.isfinite(getattr(value, name)).all() for name in ARRAYS)


def test_a_bank_beyond_fp32_is_no_fit_at_all(family: Family) -> None:
    bank, codes = random_point()
    problem = problem_of(family, random_metric("scaled"))
    assert look(problem, bank * (3e38 / bank.abs().max()), 4 * codes).error == float("inf")
    far = look(problem, bank * 1e15, codes)
    assert far.error == pytest.approx(look(problem, bank, codes).error, rel=1e-5)


def test_a_dominating_direction_leaves_no_noise(tmp_path: Path) -> None:
    """Rows of condition 5,000: f is that of fp64, where a Gram matrix in fp32 is noise."""
    random = np.random.default_rng(0)
    weights, bank = random.standard_normal((4, 20, 30)), random.standard_normal((4, 4, 30))
    bank = (bank + 1e3 * random.standard_normal(30)).astype(np.float32)
    family = make_family(tmp_path, weights)
    value = look(problem_of(family, None, shape=bank.shape), torch.from_numpy(bank), np.eye(4))
    weights = np.stack([family.read(number).double().numpy() for number in range(4)])
    fitted = [
        matrix @ np.linalg.pinv(atom) @ atom for matrix, atom in zip(weights, bank.astype(np.float64), strict=True)
    ]
    assert value.ridged == 0
    assert value.error == pytest.approx(np.square(weights - fitted).sum() / np.square(weights).sum(), rel=1e-6)


def test_small_errors_are_those_of_residuals(tmp_path: Path) -> None:
    """Of 10⁻⁸ of an expert: a difference of squares in fp32 has none of its digits."""
    bank, codes = random_point(signed=False)
    random = np.random.default_rng(1)
    weights = random.standard_normal((EXPERTS, 10, RANK)) @ np.einsum("ij,jrd->ird", codes, bank.double().numpy())
    family = make_family(tmp_path, weights + 1e-4 * weights.std() * random.standard_normal(weights.shape))
    found = look(problem_of(family, None), bank, codes)
    wanted = dense_of(family, None).shares(bank.double(), torch.from_numpy(codes))
    np.testing.assert_allclose(found.errors, wanted.numpy(), rtol=1e-3)


def test_experts_of_zeros(tmp_path: Path) -> None:
    weights = planted(0, experts=4, p=6, d=8, rank=2, atoms=3)
    weights[1] = 0
    bank, codes = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), np.ones((4, 3))
    value = look(problem_of(make_family(tmp_path / "some", weights), None, shape=(3, 2, 8)), bank, codes)
    assert value.errors[1] == 0 and value.error > 0 and bool((value.curvature[1] == 0).all())
    value = look(problem_of(make_family(tmp_path / "none", 0 * weights), None, shape=(3, 2, 8)), bank, codes)
    assert value.error == 0 and bool((value.bank == 0).all())
    assert all(bool(getattr(value, name).isfinite().all()) for name in TENSORS)


def test_an_expert_without_codes(family: Family) -> None:
    bank, codes = random_point(signed=False)
    codes[2] = 0
    found = look(problem_of(family, random_metric("scaled")), bank, codes)
    dense = dense_of(family, random_metric("scaled"))
    assert found.errors[2] == pytest.approx(float(dense.seen[2].square().sum() / dense.energy), rel=1e-5)
    assert all(bool(getattr(found, name).isfinite().all()) for name in TENSORS) and np.isfinite(found.codes).all()


def test_progress_is_in_experts(family: Family) -> None:
    steps: list[float] = []
    problem_of(family, None).look(*random_point(), 0, steps.append)
    assert sum(steps) == EXPERTS
