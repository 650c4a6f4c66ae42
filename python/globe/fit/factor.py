"""One family from its scan to the factors to be stored: seeds, loops, and what is said of them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.index import Family
from globe.choice.choose import ORDER, choose
from globe.compute.blocks import Blocks
from globe.errors import GlobeError
from globe.fit.joint import fit_joint, joint_before
from globe.fit.progress import Progress, States
from globe.fit.stored_lefts import Fit, rounded
from globe.fit.sweep import State
from globe.fit.training import Training, first_progress, train
from globe.fit.variable_projection import Problem
from globe.pipeline.metrics import proxy_error, seeds_report, training_report
from globe.runs.stages import Advance, Stages
from globe.runs.store import Store
from globe.seeds import METHODS, SeedTask
from globe.seeds.proxies import Rows, Scan, scan, split_rows
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.metric import Metric


def scan_family(family: Family, settings: Settings, stages: Stages, store: Store) -> Scan:
    """The energies of a family, from `store` or by a pass over it."""
    name = f"{family.name}.scan"
    saved = store.load(name)
    if saved is not None:
        stages.recall(saved.meta["stage"])
        return Scan(saved.array("row_energy"), saved.array("energy"))
    with stages.stage(f"{family.name}: scan", len(family)) as advance:
        found = scan(family, settings, advance)
        tensors = {"row_energy": torch.from_numpy(found.row_energy), "energy": torch.from_numpy(found.energy)}
        store.save(name, tensors, {"stage": stages.so_far()})
    return found


def factor(
    family: Family,
    shape: Shape,
    scanned: Scan,
    settings: Settings,
    device: torch.device,
    stages: Stages,
    store: Store,
    blocks: Blocks,
    metric: Metric | None = None,
    *,
    to_be_written: bool = False,
) -> dict[str, Any]:
    """Seed and train a family, as far as `store` does not say that it was done; the factors are left there.

    Where there are no loops and the factors are `to_be_written`, the seeds are not measured: writing them will.

    Returns
    -------
    dict
        The family's part of metrics.json but for what is measured on the factors as stored.
    """
    rows = split_rows(family.p, shape.rank, scanned.row_energy, settings)
    meta = store.check(f"{family.name}.fit")
    if meta is None:
        loops = settings.outer_loops > 0 or not to_be_written
        meta = _train(family, shape, rows, settings, device, stages, store, blocks, metric, loops=loops)
    else:
        for record in meta["stages"]:
            stages.recall(record)
    return {**meta["report"], "proxy_error": _proxies(family, rows, device, stages, store, blocks)}


def load_fit(family: Family, store: Store, device: torch.device) -> Fit:
    """The factors that `factor` left: on the CPU the atoms are in bf16, elsewhere in fp32."""
    saved = store.load(f"{family.name}.fit")
    if saved is None:
        raise GlobeError(f"family {family.name}: its factors were damaged during the run; run it again")
    atoms = saved.tensors["atoms"]
    if device.type != "cpu":
        atoms = atoms.float().to(device)
    return Fit(family, State(atoms, saved.tensors["codes"].double().numpy(), saved.meta["report"]["temperature"]))


def _train(
    family: Family,
    shape: Shape,
    rows: Rows,
    settings: Settings,
    device: torch.device,
    stages: Stages,
    store: Store,
    blocks: Blocks,
    metric: Metric | None,
    *,
    loops: bool,
) -> dict[str, Any]:
    """Seed the family and train it, with `loops`, or keep the seeds without a measure."""
    name, log = family.name, stages.display.log
    joint = settings.solver == "joint" and settings.outer_loops > 0
    warm = store.check(f"{name}.warm") if joint else None
    if warm is not None:
        for record in warm["stages"]:
            stages.recall(record)
        return _fit_jointly(family, warm, settings, device, stages, store, blocks, metric)
    states = States(store, name, device, stages.so_far)
    progress = states.find()
    if progress is None:
        progress = _seed(family, shape, rows, settings, device, stages, store, states, blocks)
    else:
        stages.recall(states.notes["stage"])
    seeded = states.notes["stage"]
    mixed = metric is not None and metric.mixes_rows
    if joint or mixed or METHODS[states.notes["seeds"]["choice"]["chosen"]].sees_all_rows:
        rows = rows.all_trained()
    if not loops:
        training = Training(states.load(progress.loop), None, None, [], "outer_loops")
        report = training_report(shape, rows, states.notes, training)
        return _save_fit(family, training.state, report, [seeded], store, states)
    passes = settings.outer_loops + 1 - progress.first
    with stages.stage(f"{name}: loops", passes * len(family), states.before) as advance:
        training = train(family, rows, progress, settings, advance, log, states, blocks, metric)
        if training.measure is not None and training.measure.ridged:
            log(f"{name}: {training.measure.ridged} left factors were ill-conditioned and took a ridge")
        report = training_report(shape, rows, states.notes, training)
        records = [seeded, stages.so_far()]
        if not joint:
            return _save_fit(family, training.state, report, records, store, states)
        warm = {"report": report, "stages": records, "temperature": training.state.temperature}
        tensors = {"bank": training.state.bank, "codes": torch.from_numpy(training.state.codes)}
        store.save(f"{name}.warm", tensors, warm)
        states.clear()
        del training, tensors
    return _fit_jointly(family, warm, settings, device, stages, store, blocks, metric)


def _fit_jointly(
    family: Family,
    warm: dict[str, Any],
    settings: Settings,
    device: torch.device,
    stages: Stages,
    store: Store,
    blocks: Blocks,
    metric: Metric | None,
) -> dict[str, Any]:
    """Fit bank and codes together from the state that the loops left in `store`."""
    name = family.name
    problem = Problem(family, metric, settings, blocks, device)
    passes = settings.joint_steps + settings.joint_steps // 10 + 2
    with stages.stage(f"{name}: joint", passes * len(family), joint_before(store, name)) as advance:
        rest = (settings, blocks.pairs, store, name, stages.so_far, advance, stages.display.log)
        state, steps = fit_joint(problem, _warm_start(store, name, warm["temperature"], device), *rest)
        if steps.lost:
            stages.display.log(f"{name}: the joint fit was too short for codes that were spread: its start is kept")
            del state
            state = _warm_start(store, name, warm["temperature"], device)
        report = {**warm["report"], "joint": steps.report(), "temperature": state.temperature}
        meta = _save_fit(family, state, report, [*warm["stages"], stages.so_far()], store)
    for key in ("joint", "warm"):
        store.drop(f"{name}.{key}")
    return meta


def _warm_start(store: Store, name: str, temperature: float, device: torch.device) -> State:
    saved = store.load(f"{name}.warm")
    if saved is None:
        raise GlobeError(f"family {name}: the state that its loops left was damaged during the run; run it again")
    return State(saved.tensors["bank"].to(device), saved.array("codes"), temperature)


def _save_fit(
    family: Family,
    state: State,
    report: dict[str, Any],
    records: list[dict[str, Any]],
    store: Store,
    states: States | None = None,
) -> dict[str, Any]:
    state = rounded(state)
    meta = {"report": report, "stages": records}
    codes = torch.from_numpy(state.codes.astype("float32"))
    store.save(f"{family.name}.fit", {"atoms": state.bank, "codes": codes}, meta)
    if states is not None:
        states.clear()
    return meta


def _seed(
    family: Family,
    shape: Shape,
    rows: Rows,
    settings: Settings,
    device: torch.device,
    stages: Stages,
    store: Store,
    states: States,
    blocks: Blocks,
) -> Progress:
    """Save the seeds as the state that the first loop begins with; nothing of them stays in memory."""
    auto = settings.method == "auto"
    passes = len(ORDER) if auto else METHODS[settings.method].passes(settings)
    with stages.stage(f"{family.name}: seeds", passes) as advance, store.scratch() as folder:
        log = stages.display.log
        within: Advance = (lambda passes: None) if auto else advance
        task = SeedTask(family, rows, shape.bank, settings, device, blocks.proxy_bytes, Path(folder), within, log)
        choice: dict[str, Any] = {"chosen": settings.method, "why": "asked for"}
        if auto:
            found = choose(task, METHODS, advance)
            seeds, choice = found.seeds, found.as_dict()
            del found
        else:
            seeds = METHODS[settings.method](task)
        told = [field.name for field in fields(seeds) if field.name not in ("bank", "codes")]
        report = {key: getattr(seeds, key) for key in told} | seeds_report(seeds) | {"choice": choice}
        states.notes = {"seeds": report, "stage": stages.so_far()}
        progress = first_progress(seeds.codes, settings)
        states.save(State(seeds.bank, seeds.codes, settings.temperature), progress)
    return progress


def _proxies(family: Family, rows: Rows, device: torch.device, stages: Stages, store: Store, blocks: Blocks) -> float:
    name = f"{family.name}.proxies"
    meta = store.check(name)
    if meta is None:
        with stages.stage(f"{family.name}: proxies", 1) as advance:
            bank = load_fit(family, store, device).state.bank.float()
            error = proxy_error(family, rows, bank, blocks.proxy_bytes, advance)
            meta = {"proxy_error": error, "stage": stages.so_far()}
            store.save(name, {}, meta)
    else:
        stages.recall(meta["stage"])
    return float(meta["proxy_error"])
