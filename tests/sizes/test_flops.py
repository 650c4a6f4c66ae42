"""Operations of the joint fit, counted by torch while the form of a device runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dense import ATOMS, CASES, EXPERTS, OWN, D, P, problem_of, random_metric, random_point, small_family
from families import CPU, silent
from forms import form
from globe.checkpoint.family import Family
from globe.compute.passes import engine
from globe.fit import problem as problem_module
from globe.fit.gauss_newton import Operator
from globe.fit.point import Point, Vector
from globe.fit.preconditioner import Preconditioner
from globe.fit.problem import Problem
from globe.sizes.flops import (
    SAMPLED,
    codes_flops,
    error_flops,
    iteration_flops,
    keeps_columns,
    own_error_flops,
    own_iteration_flops,
    own_pass_flops,
    own_sample_flops,
    pass_flops,
    preconditioner_flops,
    sample_flops,
    weighing_flops,
)

# A metric whose columns are those of the experts as they are ("rows") has no products of columns.
COUNTED = [case for case in CASES if case[0] != "rows"]
counted_cases = pytest.mark.parametrize(("kind", "rank"), COUNTED)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("flops"))


@contextmanager
def counted() -> Iterator[list[int]]:
    """2 k l n of every product; of addmm_, which torch's counter passes over, too."""

    def product(total: Any, left: Any, right: Any, *rest: Any, **more: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    found: list[int] = []
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with form("batched"), counter:
        yield found
    found.append(counter.get_total_flops())


def looked(family: Family, kind: str, rank: int) -> tuple[Problem, Point]:
    """A problem that has been looked at once."""
    point = Point(*random_point(signed=False, rank=rank), False)
    problem = problem_of(family, random_metric(kind), shape=(ATOMS, rank, D))
    problem.look(point.bank, point.codes, 0, silent)
    return problem, point


@counted_cases
@pytest.mark.parametrize("sampled", [EXPERTS, EXPERTS // 2], ids=["all sampled", "every second"])
def test_a_pass(sampled: int, kind: str, rank: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "SAMPLED", sampled)
    weighed = kind != "none"
    problem, point = looked(family, kind, rank)
    with counted() as found:
        problem.look(point.bank, point.codes, 0, silent)
    whole = EXPERTS * pass_flops(P, D, rank, ATOMS, weighed) + sampled * sample_flops(D, rank, weighed)
    if kind == "own":
        apart = 0 if keeps_columns(True, rank, D) else sampled
        whole += EXPERTS * own_pass_flops(D, rank, OWN) + apart * own_sample_flops(D, rank, OWN)
    assert found == [whole + EXPERTS * codes_flops(D, rank, np.count_nonzero(point.codes, axis=1).max())]


@counted_cases
def test_f_alone(kind: str, rank: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "SAMPLED", EXPERTS)
    problem, point = looked(family, kind, rank)
    with counted() as found:
        problem.look(point.bank, point.codes, None, silent)
    own = own_error_flops(D, rank, OWN) if kind == "own" else 0
    assert found == [EXPERTS * (error_flops(P, D, rank, ATOMS, kind != "none") + 2 * rank * rank * (D + 1) + own)]


@counted_cases
def test_a_product_with_the_gauss_newton_matrix(kind: str, rank: int, family: Family) -> None:
    problem, point = looked(family, kind, rank)
    given = Vector(torch.ones_like(point.bank), np.ones_like(point.codes))
    with counted() as found, engine(CPU) as workers:
        Operator(problem, point, 1.0, workers)(given)
    own = own_iteration_flops(D, rank, OWN) if kind == "own" else 0
    assert found == [EXPERTS * (iteration_flops(D, rank, ATOMS, kind != "none") + own)]


@counted_cases
def test_the_preconditioner(kind: str, rank: int, family: Family) -> None:
    problem, point = looked(family, kind, rank)
    with form("batched"), engine(CPU) as workers:
        value = problem.look(point.bank, point.codes, 0, silent)
        precondition = Preconditioner(value, point, kind != "none", workers)
        with counted() as found:
            precondition.bank(torch.ones_like(point.bank))
    assert found == [preconditioner_flops(D, rank, ATOMS, kind != "none")]


@pytest.mark.parametrize("mixes", [False, True])
def test_weighing(mixes: bool, family: Family) -> None:
    metric = random_metric("shared")
    assert metric is not None
    if mixes:
        full = random_metric("rows")
        assert full is not None
        metric = type(metric)(full.rows, metric.columns, None, metric.layers)
    weights = torch.ones(EXPERTS, P, D)
    with counted() as found:
        metric.weigh(slice(0, EXPERTS), weights)
    assert found == [EXPERTS * weighing_flops(P, D, mixes)]


def test_first_passes_make_the_experts_too(family: Family) -> None:
    point = Point(*random_point(signed=False), False)
    problem = problem_of(family, random_metric("shared"))
    with counted() as first:
        problem.look(point.bank, point.codes, 0, silent)
    with counted() as later:
        problem.look(point.bank, point.codes, 0, silent)
    assert first[0] - later[0] == EXPERTS * weighing_flops(P, D, False)


def test_when_columns_are_kept() -> None:
    assert keeps_columns(True, 4, 16) and not keeps_columns(True, 3, 16) and not keeps_columns(False, 4, 16)
    assert SAMPLED >= 16


@pytest.mark.parametrize(("p", "d", "r", "m"), [(1408, 2048, 704, 180), (384, 576, 288, 30)])
def test_an_iteration_is_cheaper_than_a_pass(p: int, d: int, r: int, m: int) -> None:
    for weighed in (False, True):
        assert iteration_flops(d, r, m, weighed) < pass_flops(p, d, r, m, weighed) / 1.5
