"""Families, banks and blocks of a compression: from settings and headers, or for a ratio of bytes by a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.choice.probe import WeightProber
from globe.choice.ratio_plan import Probing, candidates, plan_ratio, probes, sizes_of
from globe.compute.blocks import Blocks
from globe.compute.devices import device_room, pick_device, thread_count
from globe.compute.forms import per_core
from globe.compute.gemm import solver_dtype
from globe.correction.work import corrected_bytes, correction_bytes, down_rank
from globe.errors import UsageError
from globe.runs.job import Job
from globe.seeds.proxies import Scan
from globe.settings import Settings
from globe.sizes.budget import Cores, Room, fit_device, memory_limit, plan_blocks, size_text, stage_peaks
from globe.sizes.pools import Size, groups, pools, require_groups, sizes, storage, units
from globe.sizes.ratios import Shape, ratios


@dataclass(frozen=True)
class Plan:
    """A checkpoint and settings that fit each other, known from headers alone.

    `families` are the pools of experts that share a bank, `units` what is sized as one. With a ratio asked for, the
    shapes are the largest that `plan_sizes` may choose.
    """

    checkpoint: Checkpoint
    units: dict[str, Family]
    families: dict[str, Family]
    shapes: dict[str, Shape]
    device: torch.device
    blocks: Blocks


def plan(model_dir: Path, settings: Settings) -> Plan:
    """Index a checkpoint and resolve the settings on it.

    Raises
    ------
    UsageError
        If a setting does not fit the checkpoint or saves nothing.
    GlobeError
        If the checkpoint cannot be used.
    """
    checkpoint = Checkpoint(model_dir)
    for name in checkpoint.layout.families:
        checkpoint.family(name)
    families = checkpoint.chosen(settings.families)
    whole = units(families, settings)
    device = pick_device(settings.device)
    if settings.ratio is not None:
        return _sized(checkpoint, whole, _largest(whole, settings, device), settings, device)
    planned = _sized(checkpoint, whole, sizes(whole, families, settings), settings, device)
    found = ratios(checkpoint, planned.families, planned.shapes)
    if found.touched >= 1:
        raise UsageError(
            f"rank {settings.rank} with these banks stores {found.touched:.3f} of the touched matrices and saves "
            "nothing; lower --rank or --bank-size (globe inspect shows the choices)"
        )
    return planned


def _sized(
    checkpoint: Checkpoint, whole: dict[str, Family], asked: dict[str, Size], settings: Settings, device: torch.device
) -> Plan:
    held, shapes = pools(whole, asked, settings)
    for name, family in held.items():
        require_groups(family, shapes[name])
    return Plan(checkpoint, whole, held, shapes, device, _blocks(held, shapes, settings, device))


def _blocks(held: dict[str, Family], shapes: dict[str, Shape], settings: Settings, device: torch.device) -> Blocks:
    """What the memory of the host, and that of the device, have room for at a time."""
    free = device_room(device)
    blocks = plan_blocks(held, shapes, settings, _cores(settings, device))
    return blocks if free is None else fit_device(blocks, held, shapes, settings, Room(str(device), free))


def _cores(settings: Settings, device: torch.device) -> Cores:
    """What works on experts in the host's memory."""
    shared = device_room(device) is None and not per_core(device)
    return Cores(None if shared else thread_count(settings.threads), solver_dtype(settings.precision, device).itemsize)


def peaks(planned: Plan, settings: Settings, blocks: Blocks) -> dict[str, int]:
    """Bytes of resident memory that every stage is to stay below in these blocks, of all pools."""
    found = stage_peaks(planned.families, planned.shapes, settings, _cores(settings, planned.device), blocks)
    highest = {stage: max(each[stage] for each in found.values()) for stage in next(iter(found.values()))}
    rank = down_rank(planned.families, planned.shapes)
    correcting = correction_bytes(planned.checkpoint, settings, rank)
    if not correcting:
        return highest
    writing, held = highest.pop("write"), corrected_bytes(planned.checkpoint, rank) // planned.checkpoint.leading.layers
    return {**highest, "correct": writing + correcting, "write": writing + held}


def require_correction_memory(planned: Plan, settings: Settings) -> None:
    """Refuse corrections that would not fit below `max_memory`.

    Raises
    ------
    UsageError
        Says what would.
    """
    limit, needed = memory_limit(settings), peaks(planned, settings, planned.blocks).get("correct", 0)
    if needed > limit:
        raise UsageError(
            f"max_memory is {size_text(limit)}; corrections need about {size_text(needed)}: use --max-memory "
            f"{size_text(needed)}, a calibration of fewer tokens (--calibration-tokens), or --correct none"
        )


def _fits(whole: dict[str, Family], settings: Settings, device: torch.device) -> Callable[[str, Size], bool]:
    """Whether there is memory for a size of a unit, if the others take no more."""

    def fits(name: str, size: Size) -> bool:
        try:
            _blocks(*pools({name: whole[name]}, {name: size}, settings), settings, device)
        except UsageError:
            return False
        return True

    return fits


def _largest(whole: dict[str, Family], settings: Settings, device: torch.device) -> dict[str, Size]:
    """The largest bank of every unit that a plan may choose."""
    assert settings.ratio is not None, "no ratio to plan for"
    fits, largest = _fits(whole, settings, device), {}
    for name, unit in whole.items():
        offered = candidates(unit, settings.ratio, settings.scope, storage(settings))
        largest[name] = next((size for size in reversed(offered) if fits(name, size)), offered[0])
    return largest


def usual_size(planned: Plan, scans: dict[str, Scan]) -> Plan:
    """The plan with its pools, and the units that they are of, at the scale that their scans say."""
    held = {name: scans[name].usual_size(family) for name, family in planned.families.items()}
    scaled = {(e.tensor, e.index, e.first_row): e for family in held.values() for e in family.experts}
    whole = {}
    for name, unit in planned.units.items():
        experts = tuple(scaled[e.tensor, e.index, e.first_row] for e in unit.experts)
        whole[name] = replace(unit, experts=experts)
    return replace(planned, units=whole, families=held)


def plan_sizes(planned: Plan, scans: dict[str, Scan], job: Job) -> tuple[Plan, dict[str, Any]]:
    """Probe what is to be stored for the ratio asked for, unless the store has it; the plan, and what was seen."""
    settings, stages, store = job.settings, job.stages, job.store
    meta = store.check("plan")
    if meta is None:
        energies = {}
        for name, unit in planned.units.items():
            energies[name] = np.concatenate([scans[pool.name].energy for pool in groups(unit, settings.scope)])
        with stages.stage("plan", probes(len(planned.units))) as advance, store.scratch() as folder:
            prober = WeightProber(settings, planned.device, planned.blocks, Path(folder))
            fits = _fits(planned.units, settings, planned.device)
            found = plan_ratio(planned.units, energies, Probing(prober, settings, fits, advance, job.log))
            meta = {"plan": found.as_dict(), "stage": stages.so_far()}
            store.save("plan", {}, meta)
    else:
        stages.recall(meta["stage"])
    sized = sizes_of(meta["plan"])
    return _sized(planned.checkpoint, planned.units, sized, settings, planned.device), meta["plan"]
