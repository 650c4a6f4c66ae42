"""The Gauss-Newton matrix times vectors, against dense fp64 algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dense import EXPERTS, RANK, WHOLE, dense_of, problem_of, random_metric, random_point
from families import CPU, make_family, silent
from forms import form
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.passes import engine
from globe.fit import problem as problem_module
from globe.fit.gauss_newton import Operator, newton_step
from globe.fit.point import Point, Vector
from newton import (
    apply,
    by_variables,
    close,
    drawn,
    every_case,
    every_sign,
    flat,
    problem_at,
    sparse_point,
    vector_of,
)


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "solver_dtype", lambda wanted, device: torch.bfloat16)


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
