"""How long a compression will take here, how much memory and disk: from shapes, and a short probe of the machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from globe.choice.choose import ORDER
from globe.choice.plan import Plan, peaks
from globe.choice.probe import LOOPS, SAMPLE
from globe.choice.ratio_plan import probes
from globe.compute import ranks
from globe.compute.devices import thread_count
from globe.compute.forms import per_core
from globe.compute.gemm import solver_dtype
from globe.compute.rates import Rates, probe
from globe.correction.work import correction_work
from globe.fit.rounded_bank import recoding
from globe.settings import Settings
from globe.sizes.budget import memory_limit
from globe.sizes.kept import fits_jointly, kept
from globe.sizes.ratios import Shape
from globe.sizes.work import (
    Task,
    Work,
    dictionary_work,
    joint_pass_work,
    joint_start_work,
    lefts_work,
    proxies_work,
    rounding_work,
    scan_work,
    seeds_work,
    step_work,
    sweep_work,
)
from globe.statistics.memory import calibration_bytes, fisher_bytes, fisher_plan, own_plan
from globe.statistics.mixture import tokens_for
from globe.statistics.row_moments import moments_for
from globe.statistics.work import calibration_work, fisher_work, sampling_work

_STARTING = 5.0  # seconds until transformers is there and a model without weights is made


@dataclass(frozen=True)
class Expected:
    """A stage, as it will be named in metrics.json: its wall seconds, and those of the least that it may be cut to."""

    name: str
    seconds: float
    least: float


@dataclass(frozen=True)
class Estimate:
    """What a compression will take: stages in their order, bytes at the peak by stage, and of scratch files."""

    stages: tuple[Expected, ...]
    peaks: Mapping[str, int]
    scratch_bytes: int
    rates: Rates

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def least(self, done: Collection[str] = ()) -> float:
        """Seconds of all stages but those done, with one pass of every fit."""
        return sum(stage.least for stage in self.stages if stage.name not in done)

    def of(self, name: str) -> Expected:
        """The stage of a name; nothing where there is none."""
        return next((stage for stage in self.stages if stage.name == name), Expected(name, 0.0, 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seconds": self.seconds,
            "stages": [{"name": stage.name, "seconds": stage.seconds} for stage in self.stages],
            "peak_bytes": max(self.peaks.values()),
            "peaks": dict(self.peaks),
            "scratch_bytes": self.scratch_bytes,
            "gflops": self.rates.products / 1e9,
        }


def measured_rates(planned: Plan, settings: Settings) -> Rates:
    """The probe of the machine, at the shapes of the largest pool."""
    name, family = max(planned.families.items(), key=lambda item: len(item[1]))
    shape = family.p, family.d, planned.shapes[name].rank
    return probe(
        planned.device, thread_count(settings.threads), shape, solver_dtype(settings.precision, planned.device)
    )


def estimate(planned: Plan, settings: Settings, rates: Rates) -> Estimate:
    """What a compression will take, at these rates.

    The counts of operations are those of :mod:`globe.sizes.work`; loops and steps are as many as the settings allow
    at most. Ranks share what is done for experts; samples and corrections are rank 0's.
    """
    size, whole = ranks.size(), rates
    rates = replace(rates, products=rates.products * size, wide=rates.wide * size, solver=rates.solver * size)
    sparse, cached = per_core(planned.device), planned.blocks.cached
    held_bytes = solver_dtype(settings.precision, planned.device).itemsize
    stages = [_stage(f"{name}: scan", scan_work(family), rates) for name, family in planned.families.items()]
    if settings.ratio is not None:
        stages.append(_stage("plan", _ratio_work(planned, settings, sparse), rates))
    sampling, calibrating = sampling_work(planned.checkpoint, settings), calibration_work(planned.checkpoint, settings)
    if sampling.flops:
        stages.append(_stage("sample", sampling, whole))
    if calibrating.flops:
        stages.append(_more(_stage("calibrate", calibrating, rates), _STARTING))
    if settings.metric == "fisher" and calibrating.flops:
        stages.append(_stage("fisher", fisher_work(planned.checkpoint, settings), rates))
    scratch, writing, tasks = 0, Work(), []
    for name, family in planned.families.items():
        task = Task(family, planned.shapes[name], settings, sparse)
        held = kept(family, planned.shapes[name], settings, held_bytes, cached)
        scratch = max(scratch, held.on_disk)
        stages.append(_stage(f"{name}: seeds", _seeds(task), rates))
        if fits_jointly(settings):
            once = joint_start_work(task) + joint_pass_work(task, held)
            steps = step_work(task, held, settings.cg_steps) * settings.joint_steps
            stages.append(_stage(f"{name}: joint", once + steps, rates, once))
        elif settings.outer_loops > 0:
            loops = (sweep_work(task) + dictionary_work(task)) * settings.outer_loops + sweep_work(task)
            stages.append(_stage(f"{name}: loops", loops, rates, sweep_work(task)))
        packing = task.shape.storage.atoms
        if packing is not None:
            rounding = rounding_work(task.shape.bank * task.shape.rank, family.d, packing)
            aligned = replace(task, settings=replace(settings, mod="aligned"))
            rounding += sweep_work(aligned) * recoding(packing)
            rounding += joint_pass_work(task, held) if fits_jointly(settings) else Work()
            stages.append(_stage(f"{name}: round", rounding, rates))
        stages.append(_stage(f"{name}: proxies", proxies_work(task), rates))
        writing += lefts_work(task)
        tasks.append(task)
    correcting = correction_work(planned.checkpoint, tasks)
    if correcting.flops:
        stages.append(_more(_stage("correct", correcting, whole), _STARTING))
    everything = sum(info.nbytes for info in planned.checkpoint.tensors.values())
    rest = everything - sum(family.stored_bytes for family in planned.families.values())
    stages.append(_stage("write", writing + Work(read=rest, written=rest), rates))
    return Estimate(tuple(stages), _peaks(planned, settings), scratch, whole)


def seconds_of(work: Work, rates: Rates) -> float:
    """What some work takes: products, what passes through memory, calls; reading is done meanwhile."""
    products = work.flops / rates.products + work.wide / rates.wide + work.solver / rates.solver
    busy = products + work.moved / rates.memory + work.calls * rates.call
    return max(busy, work.read / rates.reading) + work.written / rates.writing


def _stage(name: str, work: Work, rates: Rates, least: Work | None = None) -> Expected:
    seconds = seconds_of(work, rates)
    return Expected(name, seconds, seconds if least is None else seconds_of(least, rates))


def _more(stage: Expected, seconds: float) -> Expected:
    return replace(stage, seconds=stage.seconds + seconds, least=stage.least + seconds)


def _seeds(task: Task) -> Work:
    if task.settings.method != "auto":
        return seeds_work(task.settings.method, task)
    total = Work()
    for method in ORDER:
        total += seeds_work(method, task)
    return total


def _ratio_work(planned: Plan, settings: Settings, sparse: bool) -> Work:
    """Of probing sizes on a few experts of every unit."""
    total = Work()
    weights = replace(settings, calibrate="none", correct="none")
    changed = replace(weights, method="grouped-subspace", solver="alternate", codes="nnls")
    for name, unit in planned.units.items():
        shape = next(planned.shapes[pool] for pool in planned.shapes if pool.startswith(name))
        sample = replace(unit, experts=unit.experts[: min(SAMPLE, len(unit))])
        bank = max(1, shape.bank * len(sample) // len(unit))
        task = Task(sample, Shape(shape.rank, bank, 0), changed, sparse)
        once = seeds_work("grouped-subspace", task) + (sweep_work(task) + dictionary_work(task)) * (LOOPS + 1)
        total += once * (probes(len(planned.units)) / len(planned.units))
    return total


def _peaks(planned: Plan, settings: Settings) -> dict[str, int]:
    found = peaks(planned, settings, planned.blocks)
    if calibration_work(planned.checkpoint, settings).flops:
        gates = planned.checkpoint.leading
        kinds, tokens = moments_for(settings.families, gates), tokens_for(settings, gates.d)
        own = own_plan(planned.checkpoint, tokens, len(kinds), memory_limit(settings), planned.device)
        needed = calibration_bytes(planned.checkpoint, tokens, len(kinds), own.directions)
        first = {"calibrate": needed}
        back = fisher_plan(planned.checkpoint, tokens, memory_limit(settings)).tokens
        if settings.metric == "fisher" and back:
            first["fisher"] = fisher_bytes(planned.checkpoint, back)
        found = first | found
    unused = "loops" if fits_jointly(settings) else "joint"
    return {stage: size for stage, size in found.items() if stage != unused}
