"""Atoms rounded to what they are packed in; codes refitted to the rounded atoms where that helps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.formats.packed import Packing
from globe.compute import ranks
from globe.compute.passes import engine
from globe.errors import GlobeError
from globe.fit.problem import Problem
from globe.fit.rounding import Rounded, round_atoms, round_nearest, round_with_feedback
from globe.fit.sums import State
from globe.fit.sweep import measure, sweep
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.settings import Settings
from globe.sizes.kept import fits_jointly
from globe.statistics.metric import Metric

Array = NDArray[np.float64]
_REFITTED = 4  # bits up to which codes are fitted anew: of 8 bits they would not see the rounding


@dataclass(frozen=True)
class RoundedBank:
    """Atoms as integers and scales (of m r rows), codes (N, m), and how many experts have new ones."""

    atoms: Rounded
    codes: Array
    refitted: int = 0


def recoding(packing: Packing | None) -> int:
    """Passes over the experts in which codes are fitted anew."""
    return 2 if packing is not None and packing.bits <= _REFITTED else 0


def passes(packing: Packing, settings: Settings) -> int:
    """Passes over the experts that rounding a bank so takes."""
    return int(fits_jointly(settings)) + recoding(packing)


def round_bank(pool: Pool, state: State, packing: Packing, job: Job, advance: Advance) -> RoundedBank:
    """Round atoms with feedback, and refit the codes to them.

    An error E of atom B_j costs Σ_i α_ij² tr(C_i E K_i Eᵀ) once left factors are fitted again, with
    C_i = A_iᵀ D_i² A_i and K_i as :class:`globe.fit.objective.Value` has it. After a joint fit, one pass like its own
    finds S_j ∝ Σ_i α_ij² t_i C_i and the mean K of the K_i, and S_j ⊗ K is what :func:`round_atoms` takes it for. After
    loops it is taken for a multiple of I ⊗ K, K = Σ_i w_i M_l, M_l the moments of the layers' inputs and w_i = ‖α_i‖²
    times the mean of D_i²; without a metric atoms are rounded to the nearest then. Codes are those of one sweep on the
    rounded atoms, of every expert whose error they lower; up to 4 bits.

    Parameters
    ----------
    pool : Pool
    state : State
        The fit.
    packing : Packing
    job : Job
    advance : callable
        Called with experts that are passed over: `passes` times all of them.
    """
    rows = state.bank.float().cpu().flatten(0, 1)
    if fits_jointly(job.settings):
        atoms = _round_jointly(pool, state, packing, job, advance)
    elif pool.metric is None or not pool.metric.columns:
        atoms = round_nearest(rows, packing.bits, packing.group)
    else:
        moment = _moment(pool.metric, state.codes)
        atoms = round_with_feedback(rows, moment, packing.bits, packing.group)
    if not recoding(packing):
        return RoundedBank(atoms, state.codes)
    pool, here = pool.all_trained(), state.bank.device
    aligned = replace(job, settings=replace(job.settings, mod="aligned"))
    now = replace(state, bank=atoms.matrix().view_as(state.bank).to(here))
    old, sums = sweep(pool, now, aligned, advance)
    new = measure(pool, replace(now, codes=sums.codes), aligned, advance)
    better = new.expert_errors < old.expert_errors
    return RoundedBank(atoms, np.where(better[:, None], sums.codes, state.codes), int(better.sum()))


def _round_jointly(pool: Pool, state: State, packing: Packing, job: Job, advance: Advance) -> Rounded:
    """Every rank rounds the atoms whose S_j it has."""
    bank = state.bank.float()
    with job.store.scratch() as folder:
        problem = Problem(pool, (len(bank), bank.shape[1], bank.shape[2]), job, Path(folder))
        value = problem.look(bank, state.codes, 0, advance)
    own = bank[ranks.atoms(len(bank))]
    mine = round_atoms(own.cpu(), value.lefts.cpu(), value.columns.cpu(), packing.bits, packing.group)
    codes, scales = (
        ranks.assembled(part.unflatten(0, own.shape[:2]).to(bank.device), len(bank)).flatten(0, 1).cpu()
        for part in (mine.codes, mine.scales)
    )
    return replace(mine, codes=codes, scales=scales)


def _moment(metric: Metric, codes: Array) -> torch.Tensor:
    """K (d, d), fp32, on the CPU."""
    device = next(iter(metric.columns.values())).device
    with engine(device) as workers:
        moments = metric.layer_moments(workers)
    energies = (codes**2).sum(1)
    weights: dict[int, float] = {}
    for number, layer in enumerate(metric.layers):
        if layer is not None:
            mean = float(metric.rows[number].square().mean())
            weights[layer] = weights.get(layer, 0.0) + float(energies[number]) * mean
    whole = sum(weights.values())
    if not np.isfinite(whole):
        raise GlobeError("the weights of the layers are not finite; calibrate again")
    total = torch.zeros_like(next(iter(moments.values())))
    for layer, weight in weights.items():
        total += (weight / whole if whole > 0 else 1 / len(weights)) * moments[layer]
    return total.cpu()
