"""Rank and bank size for a budget of bytes, from a quick probe on a sample of experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globe.checkpoint.family import Family
from globe.choice.probe import LOOPS, Prober, samples
from globe.errors import GlobeError, UsageError
from globe.settings import Settings
from globe.sizes.pools import Size, deal, groups, storage
from globe.sizes.ratios import BF16, Shape, Storage, stored_bytes, stored_elements

Array = NDArray[np.float64]

SHARES = (1 / 24, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)  # m / N
_TRUNCATED = 8  # experts whose singular values are found
_FLATTERED = 1.02  # a sample flatters large banks: its few atoms mix in fewer ways than those of the whole
_REACH, _STEP = 0.08, 0.02  # of the ratio, by which families may differ from what is asked for all
_NOTHING: Callable[[float], None] = lambda steps: None  # noqa: E731


@dataclass(frozen=True)
class Point:
    """A choice that was probed: its rank and bank, the ratio of what it stores, and the error of the sample."""

    rank: int
    bank: int
    ratio: float
    error: float


@dataclass(frozen=True)
class UnitPlan:
    """What was chosen for a unit (a family, or all that share a bank), and what was seen.

    Parameters
    ----------
    size : Size
    ratio : float
        Of what it stores.
    frontier : list of Point
        At the ratio asked for; `others` at ratios around it.
    truncated_rank, truncated_error, bank_error
        Truncated SVD of each expert at the bytes asked for and the bank chosen, on the same few experts.
    worth_it : bool
        Whether the bank is the better of the two.
    """

    size: Size
    ratio: float
    experts: int
    frontier: list[Point]
    others: list[Point]
    truncated_rank: int
    truncated_error: float
    bank_error: float
    worth_it: bool

    @property
    def best(self) -> Point:
        """The point of the frontier whose bank was chosen."""
        return next(point for point in self.frontier if point.bank == self.size.bank)


@dataclass(frozen=True)
class RatioPlan:
    """The plans of all units for one ratio."""

    ratio: float
    units: dict[str, UnitPlan]

    @property
    def sizes(self) -> dict[str, Size]:
        """What was chosen."""
        return {name: unit.size for name, unit in self.units.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sizes_of(plan: Mapping[str, Any]) -> dict[str, Size]:
    """The sizes in what `RatioPlan.as_dict` gave."""
    return {name: Size(**unit["size"]) for name, unit in plan["units"].items()}


def candidates(unit: Family, ratio: float, scope: str | int = "global", how: Storage = BF16) -> list[Size]:
    """Ranks and banks that store at most `ratio` of a unit, the largest rank for every share m / N of atoms.

    `how` is how factors are stored: ranks are those that its groups divide.

    Raises
    ------
    UsageError
        If none does.
    """
    least = len(groups(unit, scope))
    found: dict[int, Size] = {}
    for share in SHARES:
        bank = max(least, round(share * len(unit)))
        rank = _rank(unit, bank, ratio, how)
        if bank <= len(unit) and rank >= 1:
            found[bank] = Size(rank, bank)
    if not found:
        lowest = _ratio(unit, Size(how.step, least), how)
        raise UsageError(
            f"ratio is {ratio:g}, but rank {how.step} and {least} atoms store {lowest:.3f} of family {unit.name}: "
            "it is not worth compressing at that ratio; raise --ratio or leave it out of --families"
        )
    return list(found.values())


@dataclass(frozen=True)
class Probing:
    """How choices are probed.

    Parameters
    ----------
    prober : Prober
    settings : Settings
        `ratio`, `scope`.
    fits : callable
        Whether a size may be used at all (memory).
    advance : callable
        Called with 1 for every probe; `probes` says how many.
    log : callable
        Shows a line.
    """

    prober: Prober
    settings: Settings
    fits: Callable[[str, Size], bool] = lambda name, size: True
    advance: Callable[[float], None] = _NOTHING
    log: Callable[[str], None] = lambda line: None

    @property
    def ratio(self) -> float:
        """What is asked for."""
        assert self.settings.ratio is not None, "no ratio to plan for"
        return self.settings.ratio

    @property
    def how(self) -> Storage:
        """How factors are stored."""
        return storage(self.settings)


def plan_ratio(whole: Mapping[str, Family], energies: Mapping[str, Array], probing: Probing) -> RatioPlan:
    """Choose rank and bank of every unit so that all together store at most the ratio asked for.

    Candidates on the curve of equal bytes are fitted to a sample of experts, with as many atoms an expert as in
    the whole: from an atom for four experts on, downhill, until both neighbours are worse. Best is the smallest
    bank within 2 % of the lowest error. Of several units, the best share of atoms of each is also probed at ratios
    around the one asked for; errors between are interpolated (their logarithms, linearly), and the bytes are split
    where the sum of energy · error is least.

    Parameters
    ----------
    whole : mapping
        Units by name.
    energies : mapping
        ‖W_i‖² (N,) of each unit's experts.
    probing : Probing

    Raises
    ------
    UsageError
        If nothing fits the ratio.
    """
    ratio, seen = probing.ratio, {}
    for name, unit in whole.items():
        offered = candidates(unit, ratio, probing.settings.scope, probing.how)
        sized = [size for size in offered if probing.fits(name, size)]
        if not sized:
            raise UsageError(f"ratio is {ratio:g}: no bank of family {name} at that ratio fits --max-memory; raise it")
        seen[name] = _probe_unit(unit, energies[name], sized, probing)
    if len(whole) > 1:
        for name, unit in whole.items():
            seen[name] = _probe_around(unit, energies[name], seen[name], probing)
        worth = {name: float(energies[name].sum()) for name in whole}
        seen = _split(whole, seen, worth, probing)
    for name, unit_plan in seen.items():
        for line in _lines(name, len(whole[name]), unit_plan, ratio):
            probing.log(line)
    return RatioPlan(ratio, seen)


def probes(units: int) -> int:
    """How often `plan_ratio` calls `advance`, at most."""
    return units * (len(SHARES) + 1 + (2 if units > 1 else 0))


def _probe_unit(unit: Family, energy: Array, sized: list[Size], probing: Probing) -> UnitPlan:
    scope, prober, ratio, how = probing.settings.scope, probing.prober, probing.ratio, probing.how
    sampled = samples(unit, energy, scope)
    found: dict[int, tuple[Point, list[Array]]] = {}
    refused: set[int] = set()
    place: int | None = min(range(len(sized)), key=lambda k: abs(sized[k].bank / len(unit) - 1 / 4))
    while place is not None:  # from the middle downhill: the curve has one valley
        size = sized[place]
        errors = _errors(unit, size, sampled, scope, prober)
        probing.advance(1)
        if errors is None:
            refused.add(place)
        else:
            found[place] = Point(size.rank, size.bank, _ratio(unit, size, how), _mean(errors, sampled)), errors
        lowest = min(found, key=lambda k: found[k][0].error, default=place)
        near = [k for k in (lowest - 1, lowest + 1) if 0 <= k < len(sized) and k not in refused and k not in found]
        place = near[0] if near else None
    if not found:
        raise GlobeError(f"family {unit.name}: too few of its experts are not zero to plan a bank; use --rank")
    frontier = [found[k][0] for k in sorted(found)]
    bound = _FLATTERED * min(point.error for point in frontier)
    best, best_errors = next(found[k] for k in sorted(found) if found[k][0].error <= bound)
    step = -(-len(sampled) * len(sampled[0][0]) // _TRUNCATED)  # a few of every pool
    few = [(replace(sample, experts=sample.experts[::step]), energies[::step]) for sample, energies in sampled]
    share = 1.0 if how.lefts is None else how.lefts.bits / 16 + 1 / how.lefts.group
    rank = max(1, math.floor(ratio * unit.counted / len(unit) / (unit.p + unit.d) / share))
    truncated = _mean([prober.truncated(sample, rank) for sample, _ in few], few)
    probing.advance(1)
    ours, size = _mean([errors[::step] for errors in best_errors], few), Size(best.rank, best.bank)
    counted = sum(len(sample) for sample, _ in sampled)
    return UnitPlan(size, best.ratio, counted, frontier, [], rank, truncated, ours, ours <= truncated)


def _probe_around(unit: Family, energy: Array, seen: UnitPlan, probing: Probing) -> UnitPlan:
    scope = probing.settings.scope
    sampled, others = samples(unit, energy, scope), []
    for near in (probing.ratio - _REACH, probing.ratio + _REACH):
        size = Size(_rank(unit, seen.size.bank, near, probing.how), seen.size.bank)
        errors = _errors(unit, size, sampled, scope, probing.prober) if size.rank >= 1 else None
        probing.advance(1)
        if errors is not None:
            ratio = _ratio(unit, size, probing.how)
            others.append(Point(size.rank, size.bank, ratio, _mean(errors, sampled)))
    return replace(seen, others=others)


def _split(
    whole: Mapping[str, Family], seen: dict[str, UnitPlan], worth: Mapping[str, float], probing: Probing
) -> dict[str, UnitPlan]:
    """Split the bytes: ratios on a grid within what was probed, all together at most the one asked for."""
    ratio, how = probing.ratio, probing.how
    steps = round(_REACH / _STEP)
    grid = [ratio + _STEP * step for step in range(-steps, steps + 1)]
    dense = {name: unit.counted for name, unit in whole.items()}
    options: list[list[tuple[float, float, Size]]] = []
    for name, unit in whole.items():
        chosen = seen[name]
        best = chosen.best
        curve = sorted({point.ratio: max(point.error, 1e-12) for point in [*chosen.others, best]}.items())
        known = np.array([place for place, _ in curve])
        logs = np.log([error for _, error in curve])
        mine = []
        for near in grid:
            size = Size(_rank(unit, chosen.size.bank, near, how), chosen.size.bank)
            stored = _ratio(unit, size, how)
            if size.rank >= 1 and (known[0] <= stored <= known[-1] or near == ratio):
                mine.append((stored * dense[name], worth[name] * math.exp(np.interp(stored, known, logs)), size))
        options.append(mine)
    budget = ratio * sum(dense.values())
    allowed = [pick for pick in itertools.product(*options) if sum(option[0] for option in pick) <= budget]
    best_pick = min(allowed, key=lambda pick: sum(option[1] for option in pick))
    split = {}
    for (name, unit), (_, _, size) in zip(whole.items(), best_pick, strict=True):
        split[name] = replace(seen[name], size=size, ratio=_ratio(unit, size, how))
    return split


def _errors(
    unit: Family, size: Size, sampled: list[tuple[Family, Array]], scope: str | int, prober: Prober
) -> list[Array] | None:
    """The errors of all sampled pools, with as many atoms an expert as the pools have; None if one has too few."""
    pools = {pool.name: pool for pool in groups(unit, scope)}
    banks = dict(zip(pools, deal(size.bank, [len(pool) for pool in pools.values()]), strict=True))
    errors = []
    for sample, _ in sampled:
        bank = max(1, round(banks[sample.name] * len(sample) / len(pools[sample.name])))
        try:
            errors.append(prober.fit(sample, Size(size.rank, bank)))
        except GlobeError:
            return None
    return errors


def _mean(errors: list[Array], sampled: list[tuple[Family, Array]]) -> float:
    lost = sum(float(found @ energy) for found, (_, energy) in zip(errors, sampled, strict=True))
    return lost / sum(float(energy.sum()) for _, energy in sampled)


def _shape(unit: Family, size: Size, how: Storage) -> Shape:
    return Shape(size.rank, size.bank, len(unit) * size.bank, how)  # all codes, so that no run stores more


def _ratio(unit: Family, size: Size, how: Storage) -> float:
    return stored_elements(unit, _shape(unit, size, how)) / unit.counted


def _rank(unit: Family, bank: int, ratio: float, how: Storage) -> int:
    """The largest rank that stores at most `ratio` with such a bank, and can be stored; 0 if none does."""
    step, allowed = how.step, 2 * ratio * unit.counted

    def nbytes(steps: int) -> int:
        return stored_bytes(unit, _shape(unit, Size(steps * step, bank), how))

    none, many = nbytes(0), 32  # packed rows end with whole words: after so many steps without a gap
    found = min(math.floor((allowed - none) * many / (nbytes(many) - none) + 1e-9), min(unit.p, unit.d) // step)
    while found > 0 and nbytes(found) > allowed + 1e-6:
        found -= 1
    return max(0, found * step)


def _lines(name: str, experts: int, plan: UnitPlan, ratio: float) -> Iterator[str]:
    yield f"{name}: plan for ratio {ratio:g}, seen on {plan.experts} of {experts} experts after {LOOPS} loops"
    yield f"{name}: {'rank':>6} {'bank':>6} {'ratio':>7} {'error':>7}"
    for point in sorted([*plan.frontier, *plan.others], key=lambda point: (point.bank, point.rank)):
        mark = "  best" if point == plan.best else ""
        yield f"{name}: {point.rank:>6} {point.bank:>6} {point.ratio:>7.3f} {point.error:>7.4f}{mark}"
    yield f"{name}: rank {plan.size.rank} and {plan.size.bank} atoms chosen, ratio {plan.ratio:.3f}"
    compared = f"truncated SVD of rank {plan.truncated_rank} loses {plan.truncated_error:.4f} at the same bytes"
    if plan.worth_it:
        yield f"{name}: {compared}, the best bank {plan.bank_error:.4f} of the same experts"
    else:
        yield f"{name}: not worth a bank: {compared}, the best bank {plan.bank_error:.4f}; leave it out of --families"
