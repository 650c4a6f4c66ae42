"""The contract of passes over experts, for every form; and that they find the same in every stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dense import ATOMS, EXPERTS, RANK, WHOLE, D, P, problem_of, random_metric, random_point, small_family
from families import CPU, Array, make_job, make_pool, random_state, silent, whole_pool
from forms import FORMS, Looks, form, no_copies
from globe.checkpoint.family import Family
from globe.compute import passes
from globe.compute.blocks import Blocks
from globe.compute.passes import Batched, PerCore, engine, within
from globe.fit.dictionary import Equations, Solving, mod_exact
from globe.fit.dictionary_metric import mod_metric
from globe.fit.gauss_newton import Operator
from globe.fit.point import Point, Vector
from globe.fit.preconditioner import Preconditioner
from globe.fit.stored_lefts import Fit, Solved, rounded, solve_lefts
from globe.fit.sums import State
from globe.fit.sweep import measure, measure_some, sweep, sweep_some
from globe.seeds.proxies import Rows, split_rows
from globe.settings import Settings
from globe.statistics.metric import Metric

every_form = pytest.mark.parametrize("name", FORMS)
BATCHED = FORMS[1:]


@every_form
@pytest.mark.parametrize("count", [0, 1, 7, 67])
def test_every_expert_comes_once_and_in_order(name: str, count: int) -> None:
    with form(name), engine(CPU) as workers:
        found = list(workers.map(lambda part: list(range(part.start, part.stop)), count))
        assert [number for part, numbers in found for number in numbers] == list(range(count))
        assert [list(range(part.start, part.stop)) for part, _ in found] == [numbers for _, numbers in found]
        written = torch.zeros(count)
        workers.run(lambda part: _add(written, part), count)
        assert torch.equal(written, torch.ones(count))


def _add(written: torch.Tensor, part: slice) -> None:
    written[part] += 1


def test_each_form_has_its_parts_and_threads() -> None:
    threads, here = torch.get_num_threads(), threading.get_ident()

    def work(part: slice) -> tuple[int, bool, int]:
        return part.stop - part.start, threading.get_ident() == here, torch.get_num_threads()

    with engine(CPU) as workers:
        assert isinstance(workers, PerCore)
        assert [found for _, found in workers.map(work, 5)] == [(1, False, 1)] * 5
    assert torch.get_num_threads() == threads
    with form("batched"), engine(CPU) as workers:
        assert isinstance(workers, Batched)
        assert [found for _, found in workers.map(work, 5)] == [(5, True, threads)]
    for device in ("cuda", "mps", "meta"):
        with engine(torch.device(device)) as workers:
            assert isinstance(workers, Batched)


@every_form
def test_a_failing_expert_fails_the_pass_and_leaves_no_thread(name: str) -> None:
    threads, alive = torch.get_num_threads(), threading.active_count()

    def work(part: slice) -> int:
        return 1 // (0 if part.start <= 3 < part.stop else 1)

    with form(name):
        with pytest.raises(ZeroDivisionError), engine(CPU) as workers:
            list(workers.map(work, 10))
        with pytest.raises(ZeroDivisionError), engine(CPU) as workers:
            workers.run(lambda part: _add(torch.zeros(work(part)), part), 10)
        with pytest.raises(KeyError), engine(CPU) as workers:
            next(workers.map(lambda part: part, 10))
            raise KeyError
    assert torch.get_num_threads() == threads and threading.active_count() == alive


@every_form
def test_jobs_come_in_order_and_fail_where_they_are_due(name: str) -> None:
    def broken() -> int:
        raise OSError("disk")

    found: list[int] = []
    with form(name), engine(CPU) as workers:
        assert list(workers.meanwhile((lambda n=n: n) for n in range(4))) == [0, 1, 2, 3]  # type: ignore[misc]
        with pytest.raises(OSError, match="disk"):
            for value in workers.meanwhile([lambda: 1, broken, lambda: 3]):
                found.append(value)
    assert found == [1]


def test_numbers_of_a_part() -> None:
    assert within(slice(10, 20), slice(2, 5)) == slice(12, 15)


# The stages. Each gives arrays that all forms must find alike.


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("passes"))


def state() -> State:
    return random_state(3, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)


def settings_for(mod: str) -> Settings:
    return Settings(mod=mod, codes="nnls", epsilon=0.0, precision="fp32", validation_share=0.1)  # type: ignore[arg-type]


def rows_of(family: Family) -> Rows:
    """A split that depends on no weights: the scan that the rows of a run come from reads on the host."""
    return split_rows(family.p, RANK, np.zeros(family.p), settings_for("exact"))


def swept(family: Family, metric: Metric | None, mod: str = "exact") -> list[Array]:
    rows = rows_of(family)
    pool = make_pool(family, rows.all_trained() if metric is not None and metric.mixes_rows else rows, metric)
    job = make_job(settings_for(mod), blocks=Blocks(experts=4))
    alone = measure(pool, state(), job, silent)
    found, sums = sweep(pool, state(), job, silent)
    assert found.ridged == alone.ridged == sums.irregular == 0
    assert sums.errors is not None
    arrays = [found.expert_errors, alone.expert_errors, sums.codes, sums.right_side.double().numpy(), sums.errors]
    return arrays if sums.left_grams is None else [*arrays, sums.left_grams.double().numpy()]


def stepped(family: Family, metric: Metric | None) -> list[Array]:
    rng = np.random.default_rng(5)
    codes = rng.uniform(0.2, 1, (EXPERTS, ATOMS)) * (rng.random((EXPERTS, ATOMS)).argsort(1) < 3)
    lefts = rng.standard_normal((EXPERTS, P, RANK)).astype(np.float32)
    normal = torch.from_numpy(lefts.swapaxes(1, 2) @ lefts)
    residual = torch.from_numpy(rng.standard_normal((ATOMS, RANK, D)).astype(np.float32))
    bank, how, blocks = state().bank, Solving(1e-2, 4), Blocks(experts=4, columns=5)
    plain = mod_exact(Equations(codes, normal, residual.clone()), bank, how, blocks)
    assert metric is not None
    weighed = mod_metric(Equations(codes, normal, residual.clone()), bank, metric, how, blocks)
    return [plain.double().numpy(), weighed.double().numpy()]


def solved_lefts(family: Family, metric: Metric | None) -> list[Solved]:
    fits = {name: Fit(family, rounded(state()), metric if name == "b" else None) for name in ("a", "b")}
    for fit in fits.values():
        fit.state.bank.data = fit.state.bank.float()
    order = [(name, number) for number in (0, 3, 1, 2, 5, 4) for name in ("b", "a")]
    return list(solve_lefts(fits, order, Settings(), Blocks(experts=5)))


def left_factors(family: Family, metric: Metric | None) -> list[Array]:
    found = solved_lefts(family, metric)
    figures = np.array([(one.error, one.energy, *one.weighted, one.ridged, one.beyond) for one in found])
    return [torch.stack([one.left for one in found]).double().numpy(), figures]


def objective(family: Family, metric: Metric | None, rank: int = RANK) -> list[Array]:
    problem = problem_of(family, metric, shape=(ATOMS, rank, D))
    bank, codes = random_point(signed=False, rank=rank)
    value = problem.look(bank, codes, 0, silent)
    assert problem.look(bank, codes, 0, silent).error == value.error
    tensors = value.bank, value.lefts, value.columns, value.curvature, value.gram
    return [value.errors, value.codes, value.weights, *(tensor.double().numpy() for tensor in tensors)]


def curvature(family: Family, metric: Metric | None, rank: int = RANK) -> list[Array]:
    problem = problem_of(family, metric, shape=(ATOMS, rank, D))
    point = Point(*random_point(signed=False, rank=rank), False)
    value = problem.look(point.bank, point.codes, 0, silent)
    given = Vector(torch.ones_like(point.bank), np.ones_like(point.codes))
    with engine(CPU) as workers:
        found = Operator(problem, point, value.scale, workers)(given)
        preconditioned = Preconditioner(value, point, metric is not None, workers)
        inverse = preconditioned.bank(given.bank).double().numpy(), preconditioned.codes(given.codes)
    return [found.bank.double().numpy(), found.codes, *inverse]


STAGES: dict[str, Callable[[Family, Metric | None], list[Array]]] = {
    "sweep": swept,
    "aligned sweep": lambda family, metric: swept(family, metric, "aligned"),
    "fixed sweep": lambda family, metric: swept(family, metric, "fixed"),
    "dictionary": stepped,
    "left factors": left_factors,
    "objective": objective,
    "objective, columns whole": lambda family, metric: objective(family, metric, WHOLE),
    "curvature": curvature,
    "curvature, columns whole": lambda family, metric: curvature(family, metric, WHOLE),
}
CASES = [
    (stage, kind)
    for stage in STAGES
    for kind in ("none", "scaled", "own", "rows")
    if stage != "dictionary" or kind != "none"
]


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_all_forms_find_the_same(stage: str, kind: str, name: str, family: Family) -> None:
    wanted = STAGES[stage](family, random_metric(kind))
    with form(name):
        found = STAGES[stage](family, random_metric(kind))
    tolerance = {"left factors": 1e-2}.get(stage, 1e-4 if name == "batched" else 1e-3)  # of bf16, of fp32
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one, atol=tolerance * np.abs(one).max())


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_nothing_in_a_batch_makes_the_host_wait(
    stage: str, kind: str, name: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    called = 0

    class Watched(Batched):
        def map(self, work: Callable[[slice], Any], count: int) -> Iterator[tuple[slice, Any]]:
            def watched(part: slice) -> Any:
                nonlocal called
                called += 1
                with Looks() as looks, no_copies(seen):
                    found = work(part)
                seen.extend(looks.seen)
                return found

            yield from super().map(watched, count)

    monkeypatch.setattr(passes, "Batched", Watched)
    with form(name):
        STAGES[stage](family, random_metric(kind))
    assert called > 0 and seen == []


@every_form
def test_sums_of_two_halves_are_those_of_the_whole(name: str, family: Family) -> None:
    metric, settings = random_metric("scaled"), settings_for("exact")
    pool = make_pool(family, rows_of(family), metric)
    job, half, whole = make_job(settings, blocks=Blocks(experts=2)), EXPERTS // 2, slice(0, EXPERTS)
    with form(name):
        errors, sums = sweep_some(pool, state(), job, silent, whole)
        halves = slice(0, half), slice(half, EXPERTS)
        first, second = (sweep_some(pool, state(), job, silent, some) for some in halves)
        assert np.array_equal(first[1].codes[half:], np.zeros_like(sums.codes[half:]))
        first[0].merge(second[0])
        first[1].merge(second[1])
        found, wanted = first[0].measure().relative_error, errors.measure().relative_error
        assert found == pytest.approx(wanted, rel=1e-5)  # a half of three is in other batches
        np.testing.assert_allclose(first[0].trained(), errors.trained(), rtol=1e-5)
        np.testing.assert_allclose(first[1].codes, sums.codes, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first[1].right_side, sums.right_side, rtol=1e-3, atol=1e-5)
        assert sums.left_grams is not None and first[1].left_grams is not None
        torch.testing.assert_close(first[1].left_grams, sums.left_grams, rtol=1e-4, atol=1e-6)
        parts = [measure_some(pool, state(), job, silent, some) for some in halves]
        parts[0].merge(parts[1])
        np.testing.assert_allclose(parts[0].measure().expert_errors, errors.measure().expert_errors, rtol=1e-5)


@every_form
def test_irregular_and_ridged_are_summed(name: str, family: Family) -> None:
    settings = settings_for("exact")
    pool, job = make_pool(family, rows_of(family)), make_job(settings)
    start = state()
    start.bank[:, 1] = start.bank[:, 0]
    with form(name):
        errors, sums = sweep_some(pool, start, job, silent, slice(0, 2))
        others, more = sweep_some(pool, start, job, silent, slice(2, EXPERTS))
        sums.irregular, more.irregular = 2, 3
        errors.merge(others)
        sums.merge(more)
    assert errors.measure().ridged == EXPERTS and sums.irregular == 5


def test_blocks_of_every_size_give_the_same(family: Family) -> None:
    pool = whole_pool(family, random_metric("scaled"))
    for name in FORMS:
        with form(name):
            found = [
                measure(pool, state(), make_job(Settings(), blocks=Blocks(experts=size)), silent).expert_errors
                for size in (1, 4, 100)
            ]
        np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-4)


def test_threads_follow_gradients_where_the_caller_does() -> None:
    with engine(torch.device("cpu")) as workers:
        for followed in (True, False):
            with torch.set_grad_enabled(followed):
                assert [found for _, found in workers.map(lambda part: torch.is_grad_enabled(), 4)] == [followed] * 4
