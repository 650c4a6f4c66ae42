"""The left factors that are stored, fitted to the atoms as stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from globe.checkpoint.family import Family
from globe.checkpoint.powers import saturated, shared, times_power
from globe.compute.blocks import Blocks
from globe.compute.gemm import matmul, mixtures, weights_operand
from globe.compute.stream import Workers, ahead
from globe.fit.lefts import fit_lefts, row_energies, squared_errors
from globe.fit.sweep import State
from globe.settings import Settings
from globe.statistics.metric import Metric


@dataclass(frozen=True)
class Fit:
    """A pool with the state to be stored: atoms rounded to bf16 (on the CPU they are in bf16), codes to fp32."""

    family: Family
    state: State
    metric: Metric | None = None

    @property
    def exponent(self) -> int:
        """The power of two that all but faint weights of the pool were divided by; factors as written take it up."""
        return max(expert.exponent for expert in self.family.experts)


def rounded(state: State) -> State:
    """The state as it is stored: atoms in bf16 on the CPU, codes in fp32 (of fp64 type)."""
    codes = state.codes.astype(np.float32).astype(np.float64)
    return State(state.bank.bfloat16().cpu(), codes, state.temperature)


@dataclass(frozen=True)
class Solved:
    """A left factor as stored (p, r), and what is measured with it, in the weights' own scale.

    `beyond` are its values that bf16 does not hold, which are at its largest.
    """

    left: torch.Tensor
    error: float
    energy: float
    ridged: bool
    weighted: tuple[float, float]
    beyond: int = 0


def solve_lefts(
    fits: dict[str, Fit], order: list[tuple[str, int]], settings: Settings, blocks: Blocks
) -> Iterator[Solved]:
    """The experts' left factors in order; some are computed while the caller writes the last ones."""
    device = next(iter(fits.values())).state.bank.device
    groups = [order[first : first + blocks.experts] for first in range(0, len(order), blocks.experts)]

    def reading(group: list[tuple[str, int]]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [fits[name].family.read(number) for name, number in group]

    readings = ahead(map(reading, groups))
    with Workers(device) as workers:

        def solving(group: list[tuple[str, int]]) -> Callable[[], list[Solved]]:
            def solve() -> list[Solved]:
                weights, mixed = next(readings), _mixed(fits, group)

                def work(k: int) -> Solved:
                    name, number = group[k]
                    given = weights[k][None].to(device), mixed[k]
                    return _in_own_scale(_solve_one(*given, settings, fits[name].metric, number), fits[name], number)

                return list(workers.map(work, len(group)))

            return solve

        jobs = map(solving, groups)
        for solved in ahead(jobs) if device.type == "cpu" else (job() for job in jobs):
            yield from solved


def _mixed(fits: dict[str, Fit], group: list[tuple[str, int]]) -> list[torch.Tensor]:
    """B̃_i (1, r, d) of experts of any pools, each bank read once."""
    mixed: dict[tuple[str, int], torch.Tensor] = {}
    for name, fit in fits.items():
        numbers = [number for family, number in group if family == name]
        if numbers:
            composed = mixtures(fit.state.codes[numbers], fit.state.bank)
            mixed.update(zip([(name, number) for number in numbers], composed.split(1), strict=True))
    return [mixed[place] for place in group]


def _solve_one(
    weights: torch.Tensor, mixed: torch.Tensor, settings: Settings, metric: Metric | None, number: int
) -> Solved:
    weights = weights_operand(weights)
    energy = row_energies(weights)
    if metric is None:
        fit = fit_lefts(weights, mixed, settings)
        stored, beyond = saturated(fit.lefts, torch.bfloat16)
        errors = squared_errors(weights, energy, mixed, fit, stored.float())
        found = float(errors.sum()), float(energy.sum())
        return Solved(stored[0].cpu(), *found, bool(fit.ridged[0]), found, beyond)
    wanted, seen = metric.seen(number, weights[0].float()), metric.seen(number, mixed[0])
    fit = fit_lefts(wanted[None], seen[None], settings)
    stored, beyond = saturated(fit.lefts, torch.bfloat16)
    lost = weights[0].float() - matmul(stored[0].float(), mixed[0])
    weighted = metric.weigh_rows(number, wanted - matmul(stored[0].float(), seen)), metric.weigh_rows(number, wanted)
    both = _square(weighted[0]), _square(weighted[1])
    return Solved(stored[0].cpu(), _square(lost), float(energy.sum()), bool(fit.ridged[0]), both, beyond)


def _in_own_scale(solved: Solved, fit: Fit, number: int) -> Solved:
    """What was solved for W · 2^-exponent, for W; the atoms take their share of the pool's exponent."""
    exponent = fit.family.experts[number].exponent
    lifted = times_power(solved.left.float(), exponent - shared(fit.exponent)[1])
    left, beyond = saturated(lifted, torch.bfloat16)
    square, (lost, whole) = 4.0**exponent, solved.weighted
    found = solved.error * square, solved.energy * square
    seen = square * (4.0**fit.metric.exponent if fit.metric is not None else 1.0)
    return Solved(left, *found, solved.ridged, (lost * seen, whole * seen), solved.beyond + beyond)


def _square(matrix: torch.Tensor) -> float:
    return float(row_energies(matrix[None]).sum())
