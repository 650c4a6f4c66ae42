"""What a sample of experts loses in a quick fit, with a bank and without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.fit.sums import State
from globe.fit.training import train
from globe.runs.job import Job
from globe.runs.stages import Stages
from globe.runs.store import MemoryStore
from globe.seeds import METHODS, SeedTask
from globe.seeds.pool import Pool
from globe.seeds.proxies import Rows
from globe.settings import Settings
from globe.sizes.pools import Size, groups
from globe.sizes.ratios import Shape

Array = NDArray[np.float64]

SAMPLE = 24  # experts, which every share of `globe.choice.ratio_plan` divides into whole atoms
LOOPS = 3
_LAYERS = 6  # that a sample is from, with several experts each: experts of a layer have the most in common
_NOTHING: Callable[[float], None] = lambda steps: None  # noqa: E731


class Prober(Protocol):
    """What a sample of experts loses, in shares of the energy of each: with a bank, and without one."""

    def fit(self, sample: Family, size: Size) -> Array:
        """Errors (n,) of a quick fit with such a bank."""

    def truncated(self, sample: Family, rank: int) -> Array:
        """Errors (n,) of the best approximation of every expert by itself."""


@dataclass(frozen=True)
class WeightProber:
    """Errors of the weights: grouped subspaces and a few loops of alternation, NNLS codes; truncated SVD.

    In the metric of a calibration these few loops favour banks too small for the joint fit.
    """

    settings: Settings
    device: torch.device
    blocks: Blocks
    scratch: Path

    def fit(self, sample: Family, size: Size) -> Array:
        """Errors (n,) after LOOPS loops."""
        changed: dict[str, Any] = {
            "codes": "nnls",
            "l1": 0.0,
            "method": "grouped-subspace",
            "outer_loops": LOOPS,
            "solver": "alternate",
            "calibrate": "none",
            "correct": "none",
        }
        settings = replace(self.settings, **changed)
        everything = np.arange(sample.p)
        rows = Rows(everything, everything[:0], everything[: size.rank])
        pool = Pool(sample, Shape(size.rank, size.bank, len(sample) * size.bank), rows)
        job = Job(settings, self.device, self.blocks, Stages(), MemoryStore())
        seeds = METHODS[settings.method](SeedTask(pool, size.bank, job, self.scratch, _NOTHING))
        start = State(seeds.bank, seeds.codes, settings.temperature)
        found = train(pool, start, job, _NOTHING).measure
        assert found is not None, "loops measure what they make"
        return found.expert_errors

    def truncated(self, sample: Family, rank: int) -> Array:
        """Σ_{k > rank} σ_k² / Σ_k σ_k²."""
        errors = np.zeros(len(sample))
        for number in range(len(sample)):
            weights = sample.read(number).double()
            gram = weights @ weights.T if sample.p <= sample.d else weights.T @ weights
            values = torch.linalg.eigvalsh(gram).clamp(min=0)
            errors[number] = float(values[: max(0, len(values) - rank)].sum() / values.sum())
        return errors


def samples(unit: Family, energy: Array, scope: str | int) -> list[tuple[Family, Array]]:
    """Experts of a unit to probe, pool by pool, with their energies: spread over layers, several of each.

    Experts of zeros are passed over.
    """
    pools = groups(unit, scope)
    starts = np.cumsum([0, *map(len, pools)])
    chosen = _spread(len(pools), _LAYERS)
    found = []
    for place in chosen:
        pool, mine = pools[place], energy[starts[place] : starts[place + 1]]
        there = np.flatnonzero(mine > 0)
        layers = np.array([pool.experts[number].layer for number in there])
        held = sorted(set(layers.tolist()))
        each = max(1, SAMPLE // len(chosen))
        picked = [held[k] for k in _spread(len(held), min(each, max(1, _LAYERS // len(chosen))))]
        numbers: list[int] = []
        for rest, layer in zip(range(len(picked), 0, -1), picked, strict=True):
            inside = there[layers == layer]
            numbers += [int(inside[k]) for k in _spread(len(inside), -(-(each - len(numbers)) // rest))]
        if numbers:
            found.append((replace(pool, experts=tuple(pool.experts[k] for k in numbers)), mine[numbers]))
    return found


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, evenly."""
    taken = min(count, wanted)
    return [(2 * k + 1) * count // (2 * taken) for k in range(taken)]
