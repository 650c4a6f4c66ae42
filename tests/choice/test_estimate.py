"""What a compression is expected to take: counts of operations that are those of the work, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import calibrate_tiny, make_tiny
from families import CPU, make_family, make_job, planted, random_state, silent, whole_pool
from forms import form
from globe.checkpoint.family import Family
from globe.choice.choose import ORDER
from globe.choice.estimate import estimate, measured_rates, seconds_of
from globe.choice.inspect import inspect
from globe.choice.plan import Plan, peaks, plan, require_correction_memory
from globe.compute.rates import Rates, probe
from globe.correction.work import correction_bytes, correction_work
from globe.errors import UsageError
from globe.fit.dictionary import Equations, Solving, mod_exact
from globe.fit.dictionary_metric import mod_metric
from globe.fit.problem import Problem
from globe.fit.stored_lefts import Fit, solve_lefts
from globe.fit.sweep import sweep
from globe.pipeline import compress as pipeline
from globe.settings import Settings
from globe.sizes.kept import Kept
from globe.sizes.ratios import Shape
from globe.sizes.work import (
    Task,
    Work,
    dictionary_work,
    iteration_work,
    joint_pass_work,
    joint_start_work,
    lefts_work,
    sweep_work,
)
from globe.statistics.metric import Metric
from globe.statistics.texts import evaluation_text
from globe.statistics.work import calibration_work, sampling_work, stream_work

EXPERTS, P, D, RANK, ATOMS = 6, 40, 56, 24, 5
UNIT = Rates(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
NOTHING = Kept(0, 0, 0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("work"), planted(0, experts=EXPERTS, p=P, d=D, rank=RANK, atoms=ATOMS))


def metric_of(weighed: bool) -> Metric | None:
    columns = {layer: torch.eye(D) for layer in range(2)}
    scales = torch.linspace(0.5, 2.0, EXPERTS * D).view(EXPERTS, D)
    return Metric(torch.ones(EXPERTS, P), columns, scales, (0,) * 3 + (1,) * 3) if weighed else None


def task_of(family: Family, weighed: bool, **changed: str) -> Task:
    settings = Settings(calibrate="pydoc" if weighed else "none", codes="nnls", **changed)  # type: ignore[arg-type]
    return Task(family, Shape(RANK, ATOMS, 0), settings, sparse=False)


def counted(work: Callable[[], object]) -> float:
    """Operations in products of batches, as torch counts them."""
    with form("batched"), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def sweeping(family: Family, weighed: bool) -> tuple[Callable[[], object], Work]:
    task, state = task_of(family, weighed), random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    job = make_job(task.settings)
    return lambda: sweep(whole_pool(family, metric_of(weighed)), state, job, silent), sweep_work(task)


def stepping(family: Family, weighed: bool) -> tuple[Callable[[], object], Work]:
    task, state = task_of(family, weighed), random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    equations = Equations(state.codes, torch.eye(RANK).expand(EXPERTS, -1, -1).contiguous(), torch.ones(ATOMS, RANK, D))
    how, metric = Solving(1e-4, task.settings.cg_steps), metric_of(weighed)
    step = mod_exact if metric is None else None
    if step is not None:
        return lambda: step(equations, state.bank, how), dictionary_work(task)
    assert metric is not None
    return lambda: mod_metric(equations, state.bank, metric, how), dictionary_work(task)


def looking(family: Family, weighed: bool, folder: Path) -> tuple[Callable[[], object], Work]:
    task, state = task_of(family, weighed), random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    problem = Problem(whole_pool(family, metric_of(weighed)), (ATOMS, RANK, D), make_job(task.settings), folder)
    whole = joint_start_work(task) + joint_pass_work(task, NOTHING)
    return lambda: problem.look(state.bank, state.codes, 0, silent), whole


def storing(family: Family, weighed: bool) -> tuple[Callable[[], object], Work]:
    task, state = task_of(family, weighed), random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    fits = {"gate": Fit(family, state, metric_of(weighed))}
    order = [("gate", number) for number in range(EXPERTS)]
    return lambda: list(solve_lefts(fits, order, task.settings, make_job(task.settings).blocks)), lefts_work(task)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("stage", [sweeping, stepping, storing, looking])
def test_operations_are_those_of_the_work(
    stage: Callable[..., tuple[Callable[[], object], Work]],
    weighed: bool,
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch counts products, not the factors and triangular solves of r × r matrices that are expected beside."""
    monkeypatch.setattr("globe.sizes.work.own_directions", lambda *shape: 0)  # the metric has none
    more = (tmp_path,) if stage is looking else ()
    work, expected = stage(family, weighed, *more)
    found = counted(work)
    assert 0.7 < found / (expected.flops + expected.wide + expected.solver) < 1.2


def test_work_adds_up(family: Family) -> None:
    task = task_of(family, True)
    once, product = joint_pass_work(task, NOTHING), iteration_work(task, NOTHING)
    both = once + product * 3
    assert both.solver == once.solver + 3 * product.solver and both.calls == once.calls + 3 * product.calls
    assert seconds_of(Work(1, 2, 3, 4, 5, 6, 7), UNIT) == 1 + 2 + 3 + 4 + 7 + 6
    assert seconds_of(Work(1, 2, 3, 4, 50, 6, 7), UNIT) == 50 + 6
    some, on_disk = Kept(0, 800, 0), joint_pass_work(task, Kept(0, 800, 0))
    assert (on_disk.read + on_disk.written, iteration_work(task, some).read) == (800, 400)


def test_a_probe_finds_rates_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    found = probe(CPU, 2, (32, 48, 16), torch.bfloat16)
    assert min(found.products, found.wide, found.solver, found.memory) > 1e6 and 0 < found.call < 1
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source")


def planned_for(source: Path, **changed: object) -> tuple[Plan, Settings]:
    settings = Settings(**{"rank": 0.5, "bank_size": 3, "device": "cpu", "threads": 2, **changed})  # type: ignore[arg-type]
    return plan(source, settings), settings


def tasks_of(planned: Plan, settings: Settings, *, sparse: bool = True) -> list[Task]:
    return [Task(family, planned.shapes[name], settings, sparse) for name, family in planned.families.items()]


def test_an_estimate_follows_rates_and_settings(source: Path) -> None:
    rates = Rates(1e9, 1e8, 1e9, 1e9, 1e-4)
    base = estimate(*planned_for(source, calibrate="none"), rates)
    twice = Rates(2e9, 2e8, 2e9, 2e9, 5e-5, reading=2e9, writing=1e9)
    assert estimate(*planned_for(source, calibrate="none"), twice).seconds == pytest.approx(base.seconds / 2)
    more = estimate(*planned_for(source, calibrate="none", joint_steps=2 * Settings().joint_steps), rates)
    assert 1.5 < more.of("gate: joint").seconds / base.of("gate: joint").seconds < 2
    assert more.least() == base.least() < base.seconds
    assert base.least({"write"}) == pytest.approx(base.least() - base.of("write").seconds)
    assert base.of("calibrate").seconds == 0 < estimate(*planned_for(source), rates).of("calibrate").seconds
    calibrated = estimate(*planned_for(source), rates)
    assert (
        calibrated.of("fisher").seconds
        > 0
        == estimate(*planned_for(source, metric="residual"), rates).of("fisher").seconds
    )
    seeds = [
        estimate(*planned_for(source, method=method), rates).of("up: seeds").seconds for method in (*ORDER, "auto")
    ]
    assert seeds[-1] <= sum(seeds[:-1]) and min(seeds) > 0
    assert list(base.peaks) == ["seeds", "joint", "write"]
    assert list(estimate(*planned_for(source, solver="alternate"), rates).peaks) == [
        "calibrate",
        "fisher",
        "seeds",
        "loops",
        "write",
    ]


def test_an_estimate_tells_of_scratch_files(source: Path) -> None:
    planned, settings = planned_for(source, calibrate="none")
    assert estimate(planned, settings, UNIT).scratch_bytes == 0
    cramped = replace(planned, blocks=replace(planned.blocks, cached=0))
    family, rank = planned.families["gate"], planned.shapes["gate"].rank
    wanted = 4 * len(family) * (rank * rank + rank * family.d + family.p * family.d)
    assert estimate(cramped, settings, UNIT).scratch_bytes == wanted


def test_operations_of_a_calibration(source: Path) -> None:
    planned, settings = planned_for(source)
    work = calibration_work(planned.checkpoint, settings)
    assert calibration_work(planned.checkpoint, replace(settings, calibrate="none")) == Work()
    twice = calibration_work(planned.checkpoint, replace(settings, calibration_tokens=2 * 32768))
    gates = planned.checkpoint.family("gate")
    shrinking = 6 * len(gates) * gates.d**3  # of the experts' own moments, whatever the text
    assert twice.flops == 2 * work.flops - shrinking and twice.read == work.read
    with_down = replace(settings, families=("gate", "up", "down"))
    assert calibration_work(planned.checkpoint, with_down).flops > work.flops
    layers = sum(info.nbytes for name, info in planned.checkpoint.tensors.items() if name.startswith("model.layers."))
    assert work.read == layers


def test_operations_of_sampling(source: Path) -> None:
    planned, settings = planned_for(source, calibrate="auto")
    work = sampling_work(planned.checkpoint, settings)
    assert work.flops > 0 and "sample" in [stage.name for stage in estimate(planned, settings, UNIT).stages]
    assert sampling_work(planned.checkpoint, replace(settings, calibrate="self")).flops == 2 * work.flops
    for calibrate in ("pydoc", "none"):
        assert sampling_work(planned.checkpoint, replace(settings, calibrate=calibrate)) == Work()
    cramped = replace(settings, max_memory=1 << 20)
    assert sampling_work(planned.checkpoint, cramped) == Work()
    assert "sample" not in [stage.name for stage in estimate(planned, cramped, UNIT).stages]


def test_an_estimate_counts_corrections(source: Path, tmp_path: Path) -> None:
    planned, settings = planned_for(source, calibrate="pydoc", correct="down")
    without = replace(settings, correct="none")
    found = estimate(planned, settings, UNIT)
    names = [stage.name for stage in found.stages]
    assert names[-2:] == ["correct", "write"] and found.of("correct").least == found.of("correct").seconds > 0
    assert found.seconds == pytest.approx(estimate(planned, without, UNIT).seconds + found.of("correct").seconds)
    told = inspect(source, settings, estimated=True)["estimate"]
    assert "correct" in told["peaks"] and told["stages"][-2]["name"] == "correct"

    calibrate_tiny(source, tmp_path / "statistics", tokens=640)
    from_file = replace(settings, calibrate=str(tmp_path / "statistics"))
    few, tasks = replace(settings, calibration_tokens=640), tasks_of(planned, settings)
    works = {each: correction_work(planned.checkpoint, tasks_of(planned, each)) for each in (settings, few, from_file)}
    assert works[few] == works[from_file]
    assert 30 < (works[settings].flops - works[few].flops) / works[few].flops < 32768 / 640
    assert works[settings].flops > 2 * stream_work(planned.checkpoint, 32768).flops
    assert works[settings].wide == works[few].wide > sum(lefts_work(task).wide for task in tasks)
    assert correction_work(planned.checkpoint, tasks_of(planned, without)) == Work()


@pytest.mark.parametrize("families", [("gate", "up"), ("gate", "up", "down")], ids="+".join)
def test_memory_of_corrections(source: Path, families: tuple[str, ...]) -> None:
    planned, settings = planned_for(source, calibrate="pydoc", correct="down", families=families)
    without = replace(settings, correct="none")
    found = peaks(planned, settings, planned.blocks)
    assert list(found)[-2:] == ["correct", "write"]
    gates, tokens, wide = planned.checkpoint.family("gate"), 32768, 2048
    rank = planned.shapes["down"].rank if "down" in families else None
    states, sums = 2 * 4 * tokens * gates.d, 2 * 8 * min(wide, gates.p * len(gates) // gates.layers) ** 2
    sums = sums if rank is None else 2 * 8 * gates.p**2
    writing = peaks(planned, without, planned.blocks)["write"]
    assert found["correct"] - writing == correction_bytes(planned.checkpoint, settings, rank) > states + sums
    layer = len(gates) // gates.layers * gates.p * 2 * (gates.d if rank is None else rank)
    assert found["write"] - writing == layer  # of what was corrected, in bf16
    assert "correct" not in peaks(planned, without, planned.blocks)
    require_correction_memory(planned, replace(settings, max_memory=found["correct"]))
    with pytest.raises(UsageError, match=r"corrections need about .*iB: use --max-memory .* or --correct none$"):
        require_correction_memory(planned, replace(settings, max_memory=found["correct"] - 1))


@pytest.mark.parametrize("families", [("gate", "up"), ("gate", "up", "down")], ids="+".join)
def test_operations_of_corrections_are_those_of_the_work(
    families: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts products, neither factors with what they solve nor all of attention on a CPU."""
    calibrate_tiny(source, tmp_path / "statistics", text=evaluation_text("calibration"), tokens=4096, window=512)
    statistics = str(tmp_path / "statistics")
    changed: dict[str, Any] = {"calibrate": statistics, "correct": "down", "joint_steps": 1, "families": families}
    planned, settings = planned_for(source, **changed)
    seen, correct = [], pipeline.correct

    def count(checkpoint: Any, fits: dict[str, Fit], *rest: Any, **options: Any) -> Any:
        states = {name: replace(fit.state, bank=fit.state.bank.float()) for name, fit in fits.items()}
        with FlopCounterMode(display=False) as counter:
            wide = {name: replace(fit, state=states[name]) for name, fit in fits.items()}  # as on a device
            correct(checkpoint, wide, *rest, **options)
        seen.append(counter.get_total_flops())
        raise KeyboardInterrupt  # what is written comes after

    monkeypatch.setattr(pipeline, "correct", count)
    with form("batched"), pytest.raises(KeyboardInterrupt):
        pipeline.compress(source, tmp_path / "out", settings)
    expected = correction_work(planned.checkpoint, tasks_of(planned, settings, sparse=False))
    assert 0.55 < seen[0] / (expected.flops + expected.wide + expected.solver) < 1.2


def test_inspect_says_nothing_of_time_unless_asked(source: Path) -> None:
    settings = planned_for(source)[1]
    assert "estimate" not in inspect(source, settings)
    found = inspect(source, settings, estimated=True)["estimate"]
    assert np.isfinite(found["seconds"]) and found["seconds"] > 0
    with pytest.raises(UsageError, match="saves nothing"):
        inspect(source, replace(settings, rank=1.0, bank_size=16), estimated=True)


def test_the_probe_is_at_the_shapes_of_the_largest_pool(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "globe.choice.estimate.probe", lambda device, threads, shape, solver: asked.append((threads, *shape))
    )
    planned, settings = planned_for(source)
    measured_rates(planned, settings)
    family = planned.families["gate"]
    assert asked == [(2, family.p, family.d, planned.shapes["gate"].rank)]
