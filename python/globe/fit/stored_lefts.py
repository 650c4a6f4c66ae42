"""The left factors that are stored, fitted to the atoms as stored, and rounded to what they are packed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from globe.checkpoint.family import Expert, Family
from globe.checkpoint.formats.packed import Packing
from globe.checkpoint.powers import saturated_each, shared, times_power, times_powers
from globe.compute.blocks import Blocks
from globe.compute.forms import wide_dtype
from globe.compute.gemm import matmul, mixtures
from globe.compute.passes import engine
from globe.compute.spd import orthonormal_rows
from globe.compute.stream import Lane, Sent, ahead
from globe.fit.lefts import LeftFit, fit_lefts, row_energies, squared_errors
from globe.fit.rounding import Rounded, above_least, round_with_feedback
from globe.fit.sums import State
from globe.settings import Settings
from globe.statistics.metric import Metric


@dataclass(frozen=True)
class Fit:
    """A pool with the state to be stored: atoms rounded to bf16 (on the CPU they are in bf16), codes to fp32.

    Where atoms are packed, `atoms` are their integers (m r, d; int8) and scales (m r, groups), on the CPU, and the
    state has the values of these in fp32. `lefts` is how left factors are packed.
    """

    family: Family
    state: State
    metric: Metric | None = None
    lefts: Packing | None = None
    atoms: Rounded | None = None

    def rows(self, mixed: torch.Tensor) -> torch.Tensor:
        """Mixtures B̃_i (n, r, d) as stored left factors multiply them: of orthonormal rows where these are packed."""
        return mixed if self.lefts is None else orthonormal_rows(mixed)

    @property
    def power(self) -> int:
        """The power of two that these take up of `exponent`."""
        return shared(self.exponent)[1] if self.lefts is None else 0

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

    `beyond` are its values, or scales, that bf16 does not hold, which are at its largest.
    """

    left: torch.Tensor | Rounded
    error: float
    energy: float
    ridged: bool
    weighted: tuple[float, float]
    beyond: int = 0

    @property
    def values(self) -> torch.Tensor:
        """The left factor in fp32."""
        return self.left.matrix() if isinstance(self.left, Rounded) else self.left.float()


Given = Callable[[Expert], torch.Tensor | None]  # an expert's left factor (p, r; bf16), where it is not to be solved


def solve_lefts(
    fits: dict[str, Fit],
    order: list[tuple[str, int]],
    settings: Settings,
    blocks: Blocks,
    given: Given | None = None,
) -> Iterator[Solved]:
    """The experts' left factors in order; some are computed while the caller writes the last ones.

    In place of those that are `given` these come back, bit for bit, and what is measured is measured with them.
    """
    device = next(iter(fits.values())).state.bank.device
    hands = [_Hand(fits, order[first : first + blocks.experts]) for first in range(0, len(order), blocks.experts)]
    lane = Lane(device)

    def reading(hand: _Hand) -> Callable[[], list[Sent]]:
        return lambda: hand.read(lane)

    readings = ahead(map(reading, hands))
    with engine(device) as workers:

        def solving(hand: _Hand) -> Callable[[], list[Solved]]:
            def solve() -> list[Solved]:
                weights, mixed = [lane.take(sent) for sent in next(readings)], hand.mixed()
                lefts = hand.given(given)

                def work(part: slice) -> list[_Found]:
                    return [
                        _solve_run(run, weights[run.pool][run.places], mixed[run.pool][run.places], lefts, settings)
                        for run in hand.runs(part)
                    ]

                found = [each for _, several in workers.map(work, len(hand)) for each in several]
                return hand.in_order([solved for each in found for solved in each.told()])

            return solve

        yield from (solved for several in workers.meanwhile(map(solving, hands)) for solved in several)


@dataclass(frozen=True)
class _Run:
    """Experts of a pool whose numbers follow each other: the pool, its place, and theirs among its experts in hand."""

    fit: Fit
    pool: int
    places: slice
    numbers: slice


class _Hand:
    """Experts of any pools that are worked on together: pool by pool, in the order of their numbers."""

    def __init__(self, fits: dict[str, Fit], asked: list[tuple[str, int]]) -> None:
        self._order = sorted(range(len(asked)), key=lambda place: asked[place])
        pools = groupby((asked[place] for place in self._order), lambda place: place[0])
        self._pools = [(fits[name], [number for _, number in members]) for name, members in pools]
        self._runs = [
            _Run(fit, pool, slice(place, place + 1), slice(number, number + 1))
            for pool, (fit, numbers) in enumerate(self._pools)
            for place, number in enumerate(numbers)
        ]

    def __len__(self) -> int:
        return len(self._runs)

    def read(self, lane: Lane) -> list[Sent]:
        """The weights (n, p, d) of every pool's experts, sent on their way."""
        return [lane.send(*_reading(fit.family, numbers, lane)) for fit, numbers in self._pools]

    def mixed(self) -> list[torch.Tensor]:
        """B̃_i (n, r, d) of every pool's experts, each bank read once."""
        return [mixtures(fit.state.codes[numbers], fit.state.bank) for fit, numbers in self._pools]

    def given(self, given: Given | None) -> list[list[torch.Tensor | None]]:
        """The left factors of every pool's experts that are not to be solved."""
        return [
            [None if given is None else given(fit.family.experts[number]) for number in numbers]
            for fit, numbers in self._pools
        ]

    def runs(self, part: slice) -> list[_Run]:
        """A part of the experts in hand, by runs."""
        runs: list[_Run] = []
        for one in self._runs[part]:
            if runs and runs[-1].pool == one.pool and runs[-1].numbers.stop == one.numbers.start:
                last = runs.pop()
                one = _Run(
                    one.fit,
                    one.pool,
                    slice(last.places.start, one.places.stop),
                    slice(last.numbers.start, one.numbers.stop),
                )
            runs.append(one)
        return runs

    def in_order(self, found: list[Solved]) -> list[Solved]:
        """What was found of the experts in hand, in the order in which they were asked for."""
        placed = dict(zip(self._order, found, strict=True))
        return [placed[place] for place in range(len(found))]


def _reading(
    family: Family, numbers: list[int], lane: Lane
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """What reads experts of a family, and memory for them."""

    def fill(out: torch.Tensor) -> torch.Tensor:
        for place, number in enumerate(numbers):
            family.read_again(number, out[place])
        return out

    return fill, lane.memory((len(numbers), family.p, family.d), family.dtype)


@dataclass(frozen=True)
class _Lefts:
    """Left factors of n experts as they are stored: values (n, p, r) in bf16, or integers and scales (n, p, groups).

    `beyond` (n,) counts what bf16 does not hold.
    """

    values: torch.Tensor
    beyond: torch.Tensor
    scales: torch.Tensor | None = None
    packing: Packing | None = None

    def matrices(self) -> torch.Tensor:
        """The values in fp32."""
        return self.values.float() if self.scales is None else torch.stack([each.matrix() for each in self._rounded()])

    def times_powers(self, exponents: list[int]) -> _Lefts:
        """The same times 2^e_i."""
        if not any(exponents):
            return self
        floats = self.values if self.scales is None else self.scales
        scaled, beyond = saturated_each(times_powers(floats.float(), exponents), torch.bfloat16)
        if self.scales is None:
            return replace(self, values=scaled, beyond=self.beyond + beyond)
        return replace(self, scales=above_least(scaled.float()), beyond=self.beyond + beyond)

    def stored(self) -> list[torch.Tensor | Rounded]:
        """Each one's, on the CPU."""
        if self.scales is None:
            return list(self.values.cpu())
        return [replace(each, codes=each.codes.cpu(), scales=each.scales.cpu()) for each in self._rounded()]

    def _rounded(self) -> list[Rounded]:
        assert self.scales is not None and self.packing is not None, "left factors without scales"
        how = self.packing.bits, self.packing.group
        return [Rounded(codes, scales, *how) for codes, scales in zip(self.values, self.scales, strict=True)]


def _as_stored(fit: LeftFit, packing: Packing | None) -> _Lefts:
    """Left factors in bf16, or rounded to integers one column after another in their Hessian B̃ M B̃ᵀ.

    They are rounded where there is fp64: on the host, if the device has none.
    """
    if packing is None:
        return _Lefts(*saturated_each(fit.lefts, torch.bfloat16))
    there = fit.lefts.device
    here = there if wide_dtype(there) == torch.float64 else torch.device("cpu")
    rounded = [
        round_with_feedback(left, hessian, packing.bits, packing.group)
        for left, hessian in zip(fit.lefts.to(here), fit.grams.to(here), strict=True)
    ]
    codes, scales = (torch.stack([getattr(each, part) for each in rounded]).to(there) for part in ("codes", "scales"))
    return _Lefts(codes, torch.zeros_like(fit.ridged, dtype=torch.int64), scales, packing)


@dataclass(frozen=True)
class _Found:
    """A run solved, where it was: left factors as stored, and as `Solved` names them (n, 6) figures.

    The errors and energies are those of the weights as the pool has them.
    """

    run: _Run
    lefts: _Lefts
    figures: torch.Tensor

    def told(self) -> list[Solved]:
        """Every expert's, read by the host, in the weights' own scale."""
        fit = self.run.fit
        beyond = 4.0**fit.metric.exponent if fit.metric is not None else 1.0
        solved = []
        for expert, left, line in zip(
            fit.family.experts[self.run.numbers], self.lefts.stored(), self.figures.cpu().tolist(), strict=True
        ):
            error, energy, lost, whole, ridged, clipped = line
            square = 4.0**expert.exponent
            seen = square * beyond
            weighted = (lost * seen, whole * seen)
            solved.append(Solved(left, error * square, energy * square, bool(ridged), weighted, int(clipped)))
        return solved


def _solve_run(
    run: _Run, weights: torch.Tensor, mixed: torch.Tensor, given: list[list[torch.Tensor | None]], settings: Settings
) -> _Found:
    """Fit the left factors of experts W_i (n, p, d) to B̃_i (n, r, d), and store them in W_i's own scale.

    Those that are `given`, as stored, are taken for fitted.
    """
    metric, weights, mixed = run.fit.metric, weights.float(), run.fit.rows(mixed)
    family = run.fit.family
    exponents = [expert.exponent - run.fit.power for expert in family.experts[run.numbers]]

    def fitted(wanted: torch.Tensor, seen: torch.Tensor) -> LeftFit:
        found = fit_lefts(wanted, seen, settings)
        for place, left in enumerate(given[run.pool][run.places]):
            if left is not None:
                found.lefts[place] = times_power(left.to(seen.device).float(), -exponents[place])
        return found

    energy = row_energies(weights)
    if metric is None:
        fit = fitted(weights, mixed)
        stored = _as_stored(fit, run.fit.lefts)
        error = squared_errors(weights, energy, mixed, fit, stored.matrices()).sum(1)
        weighted = error, energy.sum(1)
    else:
        wanted, seen = metric.seen(run.numbers, weights.float()), metric.seen(run.numbers, mixed)
        fit = fitted(wanted, seen)
        stored = _as_stored(fit, run.fit.lefts)
        values = stored.matrices()
        error = _squares(weights.float() - matmul(values, mixed))
        lost = metric.weigh_rows(run.numbers, wanted - matmul(values, seen))
        weighted = _squares(lost), _squares(metric.weigh_rows(run.numbers, wanted))
    stored = stored.times_powers(exponents)
    columns = error, energy.sum(1), *weighted, fit.ridged, stored.beyond
    return _Found(run, stored, torch.stack([column.to(energy.dtype) for column in columns], 1))


def _squares(matrices: torch.Tensor) -> torch.Tensor:
    """‖X_i‖² (n,)."""
    return row_energies(matrices).sum(1)
