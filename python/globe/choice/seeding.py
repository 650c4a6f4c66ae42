"""The seeds of a pool: by the method asked for, or by the one that proves the best (specification, A to F and L)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from globe.choice.choose import ORDER, choose
from globe.fit.describe import bank_report
from globe.fit.progress import States
from globe.fit.stages import recalled
from globe.fit.sums import State
from globe.fit.training import first_progress
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds import METHODS, SeedTask
from globe.seeds.pool import Pool


def seed(pool: Pool, job: Job) -> States | None:
    """The state that the loops go on from: seeds, or what an earlier process left; None if the loops are done."""
    if recalled(pool, job):
        return None
    states = States(job.store, pool.name, job.device, job.stages.so_far)
    if states.find() is not None:
        job.stages.recall(states.notes["stage"])
        return states
    settings = job.settings
    auto = settings.method == "auto"
    passes = len(ORDER) if auto else METHODS[settings.method].passes(settings)
    with job.stages.stage(f"{pool.name}: seeds", passes) as advance, job.store.scratch() as folder:
        within: Advance = (lambda passes: None) if auto else advance
        task = SeedTask(pool, pool.shape.bank, job, Path(folder), within)
        choice: dict[str, Any] = {"chosen": settings.method, "why": "asked for"}
        if auto:
            found = choose(task, METHODS, advance)
            seeds, choice = found.seeds, found.as_dict()
            del found
        else:
            seeds = METHODS[settings.method](task)
        told = [field.name for field in fields(seeds) if field.name not in ("bank", "codes")]
        report = {key: getattr(seeds, key) for key in told} | bank_report(seeds.bank, seeds.codes) | {"choice": choice}
        states.notes = {"seeds": report, "stage": job.stages.so_far()}
        states.save(State(seeds.bank, seeds.codes, settings.temperature), first_progress(seeds.codes, settings))
    return states
