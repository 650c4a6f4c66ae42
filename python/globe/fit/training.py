"""The alternating loop: codes, dictionary, left factors, temperature (specification, H and I)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from globe.compute.blocks import BLOCKS, Blocks
from globe.compute.codes import supports
from globe.fit.codes import one_atom_each, spread, update_temperature
from globe.fit.dictionary import Equations, Solving, mod, mod_exact, unit_atoms
from globe.fit.dictionary_metric import mod_metric
from globe.fit.pace import Pace
from globe.fit.progress import Progress, Record, States
from globe.fit.reseed import decorrelate, reseed
from globe.fit.sums import Measure, State, Sums
from globe.fit.sweep import measure, sweep
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.settings import Settings, seconds_text


@dataclass(frozen=True)
class Training:
    """The best state, what it measures and what the seeds do (None where not measured), all loops, why it ended."""

    state: State
    measure: Measure | None
    initial: Measure | None
    history: list[Record]
    stopped: str


def train(pool: Pool, start: State | Progress, job: Job, advance: Advance, states: States | None = None) -> Training:
    """Alternate codes, dictionary and left factors from `start`, and keep the best state; all errors are in the metric.

    A loop is one pass over W: the pass that codes the targets of a state also measures it. The best state has
    the lowest relative error over all rows, which is what is delivered; the held-out rows decide when to stop.
    One state is in memory, `states` keeps the others; a `start` that is a progress goes on from those. Where every
    expert has but one atom at the start, that state is measured, as loop -1, and the loops begin with its codes
    spread. Where the metric mixes rows none is held out. Atoms that do no work are re-seeded after every loop
    that another one codes. With a turn a loop is begun only if it, and the measure of what it makes, will be done in
    time.
    """
    family, settings, log = pool.family, job.settings, job.log
    if pool.metric is not None and pool.metric.mixes_rows:
        pool = pool.all_trained()
    error = "relative error" if pool.metric is None else "weighted error"
    started = time.perf_counter()
    if isinstance(start, Progress):
        assert states is not None, "progress without the states that it speaks of"
        now, state = start, states.load(start.loop)
        started -= now.seconds
        advance((now.loop - now.first) * len(family))
    else:
        states = states if states is not None else States(device=start.bank.device)
        now, state = first_progress(start.codes, settings), start
        states.save(state, now)
    del start  # a caller that has let go of it leaves one bank in memory
    stopped, pace, told = "outer_loops", Pace(job.turn, share=1.0), False
    while True:
        sums: Sums | None = None
        late = now.loop > 0 and now.loop < settings.outer_loops and pace.loops(1) == 0
        if now.loop in (-1, settings.outer_loops) or late:
            measured = pace.a_pass(partial(measure, pool, state, job, advance))
        else:
            measured, sums = pace.a_pass(partial(sweep, pool, state, job, advance))
        median = float(np.median(supports(state.codes)))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        log(f"{family.name}: loop {now.loop}: {error} {measured.relative_error:.4f}, median support {median:g}")
        judged = _judge(replace(now, seconds=seconds), measured, median, state.temperature, settings)
        off = judged.relaxation != now.relaxation
        if off or (now.previous is not None and measured.relative_error > now.previous.relative_error):
            end = ", over-relaxation is off from here" if off else ""
            log(f"{family.name}: loop {now.loop}: the error rose{end}")
        now = judged
        if now.loop == -1:
            state = replace(state, codes=spread(state.codes, settings.support // 2, 1.0, settings.seed))
            now = replace(now, loop=0, seconds=0.0)
            states.save(state, now)
            continue
        if sums is None:
            stopped = "time_limit" if late else stopped
            break
        if now.plateau >= settings.patience:
            stopped = "plateau"
            break
        if job.turn is not None and not told:
            log(f"{family.name}: {seconds_text(job.turn.left)}: {pace.loops(settings.outer_loops - now.loop)} loops")
            told = True
        if not pace.fits_update():
            stopped = "time_limit"
            break
        if sums.irregular:
            lost = f"{sums.irregular} coding problems were singular or did not converge"
            log(f"{family.name}: loop {now.loop + 1}: {lost}")
        relaxation = now.relaxation if now.loop else 0.0
        state = pace.between(partial(_dictionary_step, state, sums, settings, relaxation, job.blocks))
        if settings.codes in ("entmax", "sparsemax") and now.loop % settings.temperature_every == 0:
            median = float(np.median(supports(state.codes)))
            temperature = update_temperature(state.temperature, median, settings.support, settings.temperature_rate)
            state = replace(state, temperature=temperature)
        reseeded = 0
        if sums.errors is not None and now.loop + 1 < settings.outer_loops:
            state, reseeded = reseed(pool, state, sums.errors, settings)
            if reseeded:
                log(f"{family.name}: loop {now.loop + 1}: {reseeded} atoms did no work and were re-seeded")
        spent = time.perf_counter() - started
        now = replace(now, loop=now.loop + 1, irregular=sums.irregular, reseeded=reseeded, previous=measured)
        now = replace(now, seconds=spent)
        states.save(state, now)
    if now.best != now.loop:
        del state, sums
        state = states.load(now.best)
    assert now.best_measure is not None and now.initial is not None
    return Training(state, now.best_measure, now.initial, now.history, stopped)


def first_progress(codes: NDArray[np.float64], settings: Settings) -> Progress:
    """Where training from these codes begins: at loop 0, or at -1 if they are to be spread first."""
    first = -1 if settings.outer_loops > 0 and one_atom_each(codes) else 0
    return Progress(settings.over_relaxation, loop=first, best=first, first=first)


def _judge(before: Progress, measured: Measure, median: float, temperature: float, settings: Settings) -> Progress:
    """What the measure of the loop in hand adds: its record, whether it is best, and whether to go on as before."""
    loop, previous, now = before.loop, before.previous, before
    if loop > 0:
        validation = None if math.isnan(measured.validation_error) else measured.validation_error
        relaxed = before.relaxation if loop > 1 and settings.mod == "exact" else 0.0
        errors = (measured.relative_error, measured.train_error, validation)
        record = Record(loop, *errors, median, temperature, relaxed, before.irregular, before.reseeded, before.seconds)
        now = replace(now, history=[*before.history, record])
    if now.best_measure is None or measured.relative_error < now.best_measure.relative_error:
        now = replace(now, best=loop, best_measure=measured)
    if previous is not None:
        if measured.train_error > previous.train_error and now.relaxation > 0:
            now = replace(now, relaxation=0.0)
        steady = loop > 1 and abs(median - before.history[-1].support_median) <= settings.support_tolerance
        gained = 1 - _judged(measured) / max(_judged(previous), np.finfo(float).tiny)
        now = replace(now, plateau=before.plateau + 1 if steady and gained < settings.tolerance else 0)
    return now if now.initial is not None else replace(now, initial=measured)


def _dictionary_step(state: State, sums: Sums, settings: Settings, relaxation: float, blocks: Blocks = BLOCKS) -> State:
    if sums.left_grams is not None:
        how = Solving(settings.mod_ridge, settings.cg_steps, relaxation)
        equations = Equations(sums.codes[sums.mine], sums.left_grams, sums.right_side, sums.mine.start)
        if sums.metric is None:
            bank = mod_exact(equations, state.bank, how, blocks)
        else:
            bank = mod_metric(equations, state.bank, sums.metric, how, blocks)
    else:
        bank = mod(sums.codes, sums.right_side, state.bank, settings.mod_ridge)
    bank, codes = unit_atoms(bank, sums.codes)
    if settings.coherence > 0:
        bank, codes = unit_atoms(decorrelate(bank, settings.coherence), codes)
    if settings.codes not in ("nnls", "signed"):
        codes = codes / codes.sum(1, keepdims=True)
    return State(bank, codes, state.temperature)


def _judged(measure: Measure) -> float:
    """The plateau is that of the held-out rows, or of all rows where none are held out."""
    return measure.relative_error if math.isnan(measure.validation_error) else measure.validation_error
