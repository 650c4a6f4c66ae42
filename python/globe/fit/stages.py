"""The stages of a pool's fit, each from what the run's store has to what the next one needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from globe.errors import GlobeError
from globe.fit.codes import one_atom_each
from globe.fit.describe import proxy_error, training_report
from globe.fit.joint import fit_joint
from globe.fit.joint_steps import drop_joint, joint_before
from globe.fit.problem import Problem
from globe.fit.progress import States
from globe.fit.rounded_bank import passes, round_bank
from globe.fit.rounding import Rounded
from globe.fit.stored_lefts import Fit, rounded
from globe.fit.sums import State
from globe.fit.training import Training, train
from globe.runs.job import Job
from globe.seeds import METHODS
from globe.seeds.pool import Pool
from globe.sizes.kept import fits_jointly


def recalled(pool: Pool, job: Job) -> bool:
    """Whether the store has the pool's fit, or what the joint fit starts from; if so, recall their stages."""
    for result in ("fit", "warm"):
        meta = job.store.check(f"{pool.name}.{result}")
        if meta is not None:
            for record in meta["stages"]:
                job.stages.recall(record)
            if result == "fit":  # what an earlier process did not come to drop
                drop_joint(job.store, pool.name)
                job.store.drop(f"{pool.name}.warm")
            return True
    return False


def alternate(pool: Pool, states: States | None, job: Job, *, measured: bool = True) -> None:
    """Alternate codes, bank and left factors from a state (specification, H); None where that is done.

    Where there are no loops the seeds are kept as they are, not `measured` if writing them will do that; and so they
    are where the joint fit starts from them, which measures them.
    """
    name, loops = pool.name, job.settings.outer_loops
    if states is None:
        return
    progress = states.progress
    assert progress is not None, "states without a state"
    mixed = pool.metric is not None and pool.metric.mixes_rows
    if fits_jointly(job.settings) or mixed or METHODS[states.notes["seeds"]["choice"]["chosen"]].sees_all_rows:
        pool = pool.all_trained()
    seeded = states.notes["stage"]
    if (loops == 0 and not measured) or fits_jointly(job.settings):
        _keep(pool, Training(states.load(progress.loop), None, None, [], "outer_loops"), [seeded], states, job)
        return
    passes = loops + 1 - progress.first
    with job.stages.stage(f"{name}: loops", passes * len(pool.family), states.before) as advance:
        training = train(pool, progress, job, advance, states)
        if training.measure is not None and training.measure.ridged:
            job.log(f"{name}: {training.measure.ridged} left factors were ill-conditioned and took a ridge")
        _keep(pool, training, [seeded, job.stages.so_far()], states, job)


def _keep(pool: Pool, training: Training, records: list[dict[str, Any]], states: States, job: Job) -> None:
    """Save what was made, as the fit or as the start of the joint fit, and drop its states."""
    state, report = training.state, training_report(pool, states.notes, training)
    if fits_jointly(job.settings):
        meta = {"report": report, "stages": records, "temperature": state.temperature}
        tensors = {"bank": state.bank, "codes": torch.from_numpy(state.codes)}
        job.store.save(f"{pool.name}.warm", tensors, meta)
    else:
        _save_fit(pool, state, report, records, job)
    states.clear()


def fit_jointly(pool: Pool, job: Job) -> None:
    """Fit bank and codes together from the seeds in the store, if asked for and not done."""
    name, store = pool.name, job.store
    if not fits_jointly(job.settings) or f"{name}.fit" in store.names():
        return
    warm = store.check(f"{name}.warm")
    if warm is None:
        raise _damaged(name)
    state = _warm_start(pool, job)
    passes = job.settings.joint_steps + 1 + int(one_atom_each(state.codes))
    stage = job.stages.stage(f"{name}: joint", passes * len(pool.family), joint_before(store, name))
    with stage as advance, store.scratch() as folder:
        sizes = (pool.shape.bank, pool.shape.rank, pool.family.d)
        problem = Problem(pool, sizes, job, Path(folder))
        state, steps = fit_joint(problem, state, job, advance)
        if steps.lost:
            job.log(f"{name}: the joint fit was too short for codes that were spread: its start is kept")
            del state
            state = _warm_start(pool, job)
        seeds = {**warm["report"]["init"], "relative_error": steps.history[0].error}
        report = {**warm["report"], "init": seeds, "joint": steps.report(), "temperature": state.temperature}
        _save_fit(pool, state, report, [*warm["stages"], job.stages.so_far()], job)
    drop_joint(store, name)
    store.drop(f"{name}.warm")


def _warm_start(pool: Pool, job: Job) -> State:
    saved = job.store.load(f"{pool.name}.warm")
    if saved is None:
        raise _damaged(pool.name)
    return State(saved.tensors["bank"].to(job.device), saved.array("codes"), saved.meta["temperature"])


def _damaged(name: str) -> GlobeError:
    return GlobeError(f"family {name}: what its joint fit starts from was damaged during the run; run it again")


def _save_fit(pool: Pool, state: State, report: dict[str, Any], records: list[dict[str, Any]], job: Job) -> None:
    state = rounded(state)
    codes = torch.from_numpy(state.codes.astype("float32"))
    job.store.save(f"{pool.name}.fit", {"atoms": state.bank, "codes": codes}, {"report": report, "stages": records})


def round_fit(pool: Pool, job: Job) -> None:
    """Round the atoms of a fit to what they are packed in, if they are to be and it is not done."""
    packing, name = pool.shape.storage.atoms, f"{pool.name}.rounded"
    if packing is None:
        return
    meta = job.store.check(name)
    if meta is not None:
        job.stages.recall(meta["stage"])
        return
    state = _state(pool, job)
    with job.stages.stage(f"{pool.name}: round", 1 + passes(packing, job.settings) * len(pool.family)) as advance:
        found = round_bank(pool, state, packing, job, advance)
        advance(1)
        tensors = {
            "atoms": found.atoms.codes,
            "scales": found.atoms.scales.bfloat16(),
            "codes": torch.from_numpy(found.codes.astype("float32")),
        }
        job.store.save(name, tensors, {"refitted": found.refitted, "stage": job.stages.so_far()})
    if found.refitted:
        job.log(f"{pool.name}: {found.refitted} experts have new codes on the rounded atoms")


def load_fit(pool: Pool, job: Job) -> Fit:
    """The factors that are stored: atoms are in bf16 on the CPU, elsewhere and where they are packed in fp32."""
    state, storage = _state(pool, job), pool.shape.storage
    if storage.atoms is None:
        return Fit(pool.family, state, pool.metric, storage.lefts)
    saved = job.store.load(f"{pool.name}.rounded")
    if saved is None:
        raise _fit_damaged(pool.name)
    parts = saved.tensors
    atoms = Rounded(parts["atoms"], parts["scales"].float(), storage.atoms.bits, storage.atoms.group)
    bank = atoms.matrix().view(state.bank.shape).to(job.device)
    state = State(bank, parts["codes"].double().numpy(), state.temperature)
    return Fit(pool.family, state, pool.metric, storage.lefts, atoms)


def _state(pool: Pool, job: Job) -> State:
    saved = job.store.load(f"{pool.name}.fit")
    if saved is None:
        raise _fit_damaged(pool.name)
    atoms = saved.tensors["atoms"]
    if job.device.type != "cpu":
        atoms = atoms.float().to(job.device)
    return State(atoms, saved.tensors["codes"].double().numpy(), saved.meta["report"]["temperature"])


def fit_report(pool: Pool, job: Job) -> dict[str, Any]:
    """The pool's part of metrics.json but for what is measured on the factors as stored."""
    meta = job.store.check(f"{pool.name}.fit")
    if meta is None:
        raise _fit_damaged(pool.name)
    return {**meta["report"], "proxy_error": _proxies(pool, job)}


def _fit_damaged(name: str) -> GlobeError:
    return GlobeError(f"family {name}: its factors were damaged during the run; run it again")


def _proxies(pool: Pool, job: Job) -> float:
    name = f"{pool.name}.proxies"
    meta = job.store.check(name)
    if meta is None:
        with job.stages.stage(f"{pool.name}: proxies", 1) as advance:
            bank = load_fit(pool, job).state.bank.float()
            error = proxy_error(pool, bank, job.blocks.proxy_bytes, advance)
            meta = {"proxy_error": error, "stage": job.stages.so_far()}
            job.store.save(name, {}, meta)
    else:
        job.stages.recall(meta["stage"])
    return float(meta["proxy_error"])
