"""The alternating loop: codes, dictionary, left factors, temperature (specification, H and I)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from globe.checkpoint import Family
from globe.codes import supports, update_temperature
from globe.dictionary import mod, mod_exact, unit_atoms
from globe.proxies import Rows
from globe.settings import Settings
from globe.stages import Advance
from globe.sweep import Measure, State, Sums, measure, sweep


@dataclass(frozen=True)
class Record:
    """One loop's line in metrics.json: the state it left, and its wall time in seconds."""

    loop: int
    relative_error: float
    train_error: float
    validation_error: float | None
    support_median: float
    temperature: float
    over_relaxation: float
    irregular_codes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """The best state, what it measures, the seeds' measure, all loops, and why it ended."""

    state: State
    measure: Measure
    initial: Measure
    history: list[Record]
    stopped: str


def train(
    family: Family,
    rows: Rows,
    state: State,
    settings: Settings,
    advance: Advance,
    log: Callable[[str], None] = lambda line: None,
) -> Training:
    """Alternate codes, dictionary and left factors from `state`, and keep the best state.

    A loop is one pass over W: the pass that codes the targets of a state also measures it. The best state has
    the lowest relative error over all rows, which is what is delivered; the held-out rows decide when to stop.
    """
    best: tuple[State, Measure] | None = None
    initial: Measure | None = None
    history: list[Record] = []
    relaxation, plateau, irregular, stopped = settings.over_relaxation, 0, 0, "outer_loops"
    previous: Measure | None = None
    started = time.perf_counter()
    for loop in range(settings.outer_loops + 1):
        last = loop == settings.outer_loops
        sums: Sums | None = None
        if last:
            now = measure(family, rows, state, settings, advance)
        else:
            now, sums = sweep(family, rows, state, settings, advance)
        median = float(np.median(supports(state.codes)))
        validation = None if math.isnan(now.validation_error) else now.validation_error
        seconds, started = time.perf_counter() - started, time.perf_counter()
        if loop:
            history.append(
                Record(
                    loop,
                    now.relative_error,
                    now.train_error,
                    validation,
                    median,
                    state.temperature,
                    relaxation if loop > 1 and settings.mod == "exact" else 0.0,
                    irregular,
                    seconds,
                )
            )
        log(f"{family.name}: loop {loop}: relative error {now.relative_error:.4f}, median support {median:g}")
        initial = initial or now
        if best is None or now.relative_error < best[1].relative_error:
            best = (state, now)
        if previous is not None:
            if now.train_error > previous.train_error and relaxation > 0:
                log(f"{family.name}: loop {loop}: the error rose, over-relaxation is off from here")
                relaxation = 0.0
            steady = loop > 1 and abs(median - history[-2].support_median) <= settings.support_tolerance
            gained = 1 - _judged(now) / max(_judged(previous), np.finfo(float).tiny)
            plateau = plateau + 1 if steady and gained < settings.tolerance else 0
        if sums is None:
            break
        if plateau >= settings.patience:
            stopped = "plateau"
            break
        if sums.irregular:
            log(f"{family.name}: loop {loop + 1}: {sums.irregular} coding problems were singular or did not converge")
        previous, irregular = now, sums.irregular
        state = _dictionary_step(state, sums, settings, relaxation if loop else 0.0)
        if settings.codes in ("entmax", "sparsemax") and loop % settings.temperature_every == 0:
            median = float(np.median(supports(state.codes)))
            temperature = update_temperature(state.temperature, median, settings.support, settings.temperature_rate)
            state = replace(state, temperature=temperature)
    assert best is not None and initial is not None
    return Training(*best, initial, history, stopped)


def _dictionary_step(state: State, sums: Sums, settings: Settings, relaxation: float) -> State:
    if sums.left_grams is not None:
        bank = mod_exact(
            sums.codes, sums.left_grams, sums.right_side, state.bank, settings.mod_ridge, settings.cg_steps, relaxation
        )
    else:
        bank = mod(sums.codes, sums.right_side, state.bank, settings.mod_ridge)
    bank, codes = unit_atoms(bank, sums.codes)
    if settings.codes != "nnls":
        codes = codes / codes.sum(1, keepdims=True)
    return State(bank, codes, state.temperature)


def _judged(measure: Measure) -> float:
    """The plateau is that of the held-out rows, or of all rows where none are held out."""
    return measure.relative_error if math.isnan(measure.validation_error) else measure.validation_error
