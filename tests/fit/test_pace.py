"""Fits that keep to a turn, on a clock that only they move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clocks import Clock, moved_by_fits
from families import make_family, make_job, planted, random_state, silent, whole_pool
from globe.checkpoint.family import Family
from globe.compute.codes import supports
from globe.fit import joint
from globe.fit.joint import fit_joint
from globe.fit.joint_steps import Steps
from globe.fit.pace import Fitting, Pace
from globe.fit.problem import Problem
from globe.fit.sums import State
from globe.fit.training import Training, train
from globe.runs.store import MemoryStore, Store
from globe.runs.turn import Turn
from globe.settings import Settings

EXPERTS, ATOMS, RANK, P, D = 12, 6, 3, 8, 12
PASS, PRODUCT = 10.0, 1.0


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    weights = planted(0, experts=EXPERTS, p=P, d=D, rank=RANK, atoms=ATOMS, uses=3, noise=0.2)
    return make_family(tmp_path_factory.mktemp("pace"), weights)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    moved_by_fits(found, monkeypatch, PASS, PRODUCT)
    return found


def start(**more: Any) -> State:
    return random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D, **more)


def fit(
    family: Family, turn: Turn | None, tmp_path: Path, store: Store | None = None, **changed: Any
) -> tuple[State, Steps, list[str]]:
    lines: list[str] = []
    settings = Settings(**{"joint_steps": 20, "support": 3, "tolerance": 0.0, **changed})
    job = replace(make_job(settings, lines=lines, store=store), turn=turn)
    problem = Problem(whole_pool(family), (ATOMS, RANK, D), job, tmp_path)
    with job.stages.stage("joint", 1):
        return *fit_joint(problem, changed.pop("begin", None) or start(), job, silent), lines


@pytest.mark.parametrize("seconds", [60, 95, 150, 300])
def test_a_joint_fit_ends_in_time_with_its_supports_met(
    seconds: float, family: Family, clock: Clock, tmp_path: Path
) -> None:
    began = clock()
    state, steps, lines = fit(family, Turn(began + seconds, clock), tmp_path)
    assert steps.stopped == "time_limit" and 0 < steps.step < 20
    assert began + PASS < clock() <= began + seconds
    assert np.median(supports(state.codes)) <= 3
    assert steps.history[-1].error < steps.history[0].error
    told = [line for line in lines if "iterations" in line]
    assert len(told) == 1 and told[0].startswith("gate: ")


def test_more_time_is_more_steps_and_a_lower_error(family: Family, clock: Clock, tmp_path: Path) -> None:
    found = [fit(family, Turn(clock() + seconds, clock), tmp_path)[1] for seconds in (60, 120, 300, 3000)]
    steps, errors = [each.step for each in found], [each.history[-1].error for each in found]
    assert steps == sorted(set(steps)) and errors == sorted(errors, reverse=True)
    assert found[-1].stopped == "joint_steps"


def test_time_that_suffices_changes_nothing(family: Family, clock: Clock, tmp_path: Path) -> None:
    free, timed = (fit(family, turn, tmp_path, joint_steps=4) for turn in (None, Turn(clock() + 1e6, clock)))
    assert torch.equal(free[0].bank, timed[0].bank) and (free[0].codes == timed[0].codes).all()
    assert [line.error for line in free[1].history] == [line.error for line in timed[1].history]
    assert free[1].stopped == timed[1].stopped == "joint_steps"


@pytest.mark.parametrize("codes", ["entmax", "sparsemax", "nnls"])
def test_without_time_for_a_step_supports_shrink_all_the_same(
    codes: str, family: Family, clock: Clock, tmp_path: Path
) -> None:
    state, steps, lines = fit(family, Turn(clock() + 1, clock), tmp_path, codes=codes)
    assert (steps.stopped, steps.step, steps.evaluations) == ("time_limit", 0, len(steps.history))
    assert any("no step fits" in line for line in lines)
    assert np.median(supports(state.codes)) <= (3 if codes != "nnls" else ATOMS)
    assert (supports(state.codes) >= 1).all() and np.isfinite(state.bank.numpy()).all()


def test_one_atom_each_is_kept_where_no_step_fits(family: Family, clock: Clock, tmp_path: Path) -> None:
    begin = replace(start(), codes=np.eye(ATOMS)[np.arange(EXPERTS) % ATOMS])
    wanted = begin.codes.copy()
    job = replace(make_job(Settings(support=3)), turn=Turn(clock() + 1, clock))
    with job.stages.stage("joint", 1):
        state, steps = fit_joint(Problem(whole_pool(family), (ATOMS, RANK, D), job, tmp_path), begin, job, silent)
    assert steps.stopped == "time_limit" and not steps.lost
    np.testing.assert_array_equal(state.codes > 0, wanted > 0)


def test_a_line_search_is_not_begun_again_without_time(
    family: Family, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first try does not lower f and the second does not fit, the state before the step is delivered."""
    found, looked = joint.newton_step, []

    def uphill(*given: Any) -> Any:
        newton = found(*given)
        looked.append(newton)
        return replace(newton, step=newton.step.scale_(-1.0)) if len(looked) == 2 else newton

    monkeypatch.setattr(joint, "newton_step", uphill)
    state, steps, lines = fit(family, Turn(clock() + 90, clock), tmp_path, codes="nnls")
    assert (steps.step, steps.stopped, len(looked)) == (1, "time_limit", 2)
    assert lines[-1] == "gate: step 1: no step lowers the error in time"
    assert np.isfinite(state.bank.numpy()).all()


def test_a_fit_goes_on_in_a_turn_of_its_own(family: Family, clock: Clock, tmp_path: Path) -> None:
    store = MemoryStore()
    first = fit(family, Turn(clock() + 80, clock), tmp_path, store)[1]
    second = fit(family, Turn(clock() + 80, clock), tmp_path, store)[1]
    assert first.stopped == second.stopped == "time_limit" and second.step > first.step > 0
    assert second.history[-1].error < first.history[-1].error


def test_iterations_are_fewer_where_half_as_many_steps_more_fit() -> None:
    clock = Clock(0.0)
    pace = Pace(Turn(220.0, clock), share=1.0)
    pace.a_pass(lambda: clock.tick(2.0))
    pace.products(lambda: clock.tick(18.0), lambda nothing: 8)  # 2 seconds each
    assert clock() == 20
    # with a tenth to spare a step of 8 takes 24.2 seconds of the 200 that are left, one of 4 takes 15.4
    assert pace.steps(20, 8) == Fitting(12, 4)
    assert pace.steps(8, 8) == Fitting(8, 8)
    assert pace.steps(20, 8, passes=10) == Fitting(11, 4)
    pace.a_pass(lambda: clock.tick(30.0))  # where passes take the most, shorter steps gain little
    assert pace.steps(20, 8) == Fitting(3, 8)
    clock.now = 170
    assert pace.steps(20, 8) == Fitting(1, 4)
    clock.now = 174
    assert pace.steps(20, 8).steps == 0 and pace.fits_pass()
    clock.now = 190
    assert not pace.fits_pass()


def test_without_a_turn_all_fits() -> None:
    pace = Pace(None, share=1.0)
    assert pace.steps(14, 8) == Fitting(14, 8) and pace.loops(6) == 6
    assert pace.fits_pass() and pace.fits_update()


def loops(family: Family, turn: Turn | None, **changed: Any) -> tuple[Training, list[str]]:
    lines: list[str] = []
    settings = Settings(**{"solver": "alternate", "outer_loops": 6, "codes": "nnls", "patience": 100, **changed})
    job = replace(make_job(settings, lines=lines), turn=turn)
    return train(whole_pool(family), start(), job, silent), lines


@pytest.mark.parametrize(("seconds", "done"), [(15, 0), (33, 1), (40, 2), (52, 3), (1000, 6)])
def test_a_loop_is_begun_only_if_it_fits(seconds: float, done: int, family: Family, clock: Clock) -> None:
    began = clock()
    found, lines = loops(family, Turn(began + seconds, clock))
    assert clock() <= began + seconds or done == 0
    assert len(found.history) == done
    assert found.stopped == ("outer_loops" if done == 6 else "time_limit")
    free = loops(family, None, outer_loops=max(done, 1))[0]
    assert [each.relative_error for each in found.history] == [each.relative_error for each in free.history][:done]
    assert found.measure is not None
    assert any(line.endswith(" loops") for line in lines)
