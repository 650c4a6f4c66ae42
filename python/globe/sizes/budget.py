"""How much is in hand at a time, so that the process stays below a ceiling of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from globe.checkpoint.family import Family
from globe.compute import ranks
from globe.compute.blocks import BLOCKS, SMALLEST, Blocks
from globe.errors import UsageError
from globe.machine import control_groups
from globe.machine.launch import sharing
from globe.settings import Settings
from globe.sizes.flops import PROBED, SKETCHED, keeps_columns
from globe.sizes.kept import fits_jointly, kept
from globe.sizes.own import own_directions
from globe.sizes.ratios import Shape

BASE = 768 << 20  # the interpreter with torch, and freed memory that the allocator keeps
DEVICE_BASE = 512 << 20  # workspaces of a device's libraries, and what its allocator cannot give away
EXPERTS_AT_ONCE = 64  # in the exact dictionary step
_FEW = 8  # experts, for which a pass spends some percent of its time on reading the bank
_BANKS = 7  # of the joint fit: point, residual, step, direction, image, preconditioned; a trial takes three's place
_BANKS_IN_METRIC = 7  # of the exact dictionary step in a metric, which solves for the whole bank
SKETCH_COLUMNS = 32  # of an expert, in grouped-subspace
SEEN_GRAM_BYTES = 64 << 20  # of a block of the bank as a layer sees it


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the control group that the process is held in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = control_groups.memory_limit()
    return min(total, held) if held is not None else total


def memory_limit(settings: Settings) -> int:
    """`max_memory`, or half of the machine's, shared with GloBE's other processes there."""
    return settings.max_memory if settings.max_memory is not None else machine_memory() // 2 // sharing()


@dataclass(frozen=True)
class Cores:
    """What works on experts.

    Parameters
    ----------
    threads : int or None
        Experts worked on at the same time; None where it is all in hand, in the same memory.
    solver_bytes : int
        Bytes of a number inside conjugate gradients, 2 or 4.
    """

    threads: int | None
    solver_bytes: int


def plan_blocks(
    families: Mapping[str, Family], shapes: Mapping[str, Shape], settings: Settings, cores: Cores
) -> Blocks:
    """The largest blocks with which no stage is expected above `settings.max_memory`, from the shapes alone.

    Parameters
    ----------
    families, shapes : mapping
        By the name of the family, or of the pool of experts that share a bank.
    settings : Settings
    cores : Cores

    Raises
    ------
    UsageError
        If no block is small enough; says what would fit.
    """
    limit = memory_limit(settings)
    chosen = BLOCKS
    for cost in _costs(families, shapes, settings, cores):
        if cost.peak(SMALLEST) > limit:
            raise UsageError(_advice(cost, SMALLEST, limit, f"max_memory is {size_text(limit)}"))
        chosen = _shrunk(chosen, cost, SMALLEST, limit)
    return chosen


@dataclass(frozen=True)
class Room:
    """What a device with a memory of its own has of it: its name, and the bytes that are free."""

    device: str
    free: int


def fit_device(
    blocks: Blocks, families: Mapping[str, Family], shapes: Mapping[str, Shape], settings: Settings, room: Room
) -> Blocks:
    """The largest blocks, of those that the host has room for, with which all that lies on the device fits there.

    Parameters
    ----------
    blocks : Blocks
        Of `plan_blocks`.
    families, shapes, settings
        As there.
    room : Room

    Raises
    ------
    UsageError
        If there is no room for two experts; says what would fit.
    """
    least = replace(SMALLEST, experts=2)
    chosen = replace(blocks, experts=max(blocks.experts, least.experts))
    for cost in _costs(families, shapes, settings, Cores(None, 4)):
        there = replace(cost, base=DEVICE_BASE)
        if there.peak(least) > room.free:
            raise UsageError(_advice(there, least, room.free, f"device {room.device} has {size_text(room.free)} free"))
        chosen = _shrunk(chosen, there, least, room.free)
    return chosen


def stage_peaks(
    families: Mapping[str, Family],
    shapes: Mapping[str, Shape],
    settings: Settings,
    cores: Cores,
    blocks: Blocks,
) -> dict[str, dict[str, int]]:
    """Bytes of resident memory that every stage of every pool is to stay below in these blocks, by pool and stage."""
    costs = _costs(families, shapes, settings, cores)
    return {cost.family.name: cost.peaks(blocks) for cost in costs}


def _costs(
    families: Mapping[str, Family],
    shapes: Mapping[str, Shape],
    settings: Settings,
    cores: Cores,
) -> list[_Cost]:
    stored = sum(
        (2 if shapes[name].storage.atoms is None else 5) * shapes[name].bank * shapes[name].rank * family.d
        for name, family in families.items()
    )
    return [_Cost(family, shapes[name], settings, cores, stored) for name, family in families.items()]


def _shrunk(chosen: Blocks, cost: _Cost, least: Blocks, limit: int) -> Blocks:
    """The blocks, made smaller until the cost is within a limit, which it is with the `least`."""
    for field in ("experts", "columns", "proxy_bytes"):
        while cost.peak(replace(least, **{field: getattr(chosen, field)})) > limit:
            chosen = replace(chosen, **{field: max(getattr(least, field), getattr(chosen, field) // 2)})
    for smallest in (_FEW, least.experts):
        while cost.peak(replace(chosen, cached=0)) > limit and chosen.experts > smallest:
            chosen = replace(chosen, experts=max(smallest, chosen.experts // 2))
    if cost.peak(chosen) > limit:
        chosen = replace(chosen, cached=min(chosen.cached, limit - cost.peak(replace(chosen, cached=0))))
    return chosen


@dataclass(frozen=True)
class _Cost:
    """Bytes that the stages of one family hold at their peaks; `stored` is all banks as they are while written."""

    family: Family
    shape: Shape
    settings: Settings
    cores: Cores
    stored: int
    base: int = BASE

    @property
    def bank(self) -> int:
        return 4 * self.shape.bank * self.shape.rank * self.family.d

    @property
    def loops(self) -> int:
        return self.settings.outer_loops if self.settings.solver == "alternate" else 0

    @property
    def left_grams(self) -> int:
        exact = self.settings.mod == "exact" and self.loops > 0
        return ranks.most_dealt(self.family) * self.shape.rank**2 * self.cores.solver_bytes if exact else 0

    @property
    def metric(self) -> int:
        """What a metric keeps of layers and experts, where there may be one."""
        if self.settings.calibrate == "none":
            return 0
        p, d, layers = self.family.p, self.family.d, len({expert.layer for expert in self.family.experts})
        each = d + p * (p if "down" in self.family.families else 1) + own_directions(len(self.family), d) * (d + 1)
        return 4 * layers * d * d + 4 * len(self.family) * each

    def workers(self, blocks: Blocks) -> int:
        """What each worker, or a batch on a device, makes of experts: W, W B̃ᵀ, A, A⁺W, r × r matrices in fp64."""
        p, d, r = self.family.p, self.family.d, self.shape.rank
        turned = 2 * p * d * self.family.bytes_per_weight if "down" in self.family.families else 0
        seen = min(SEEN_GRAM_BYTES, self.bank) if self.metric else 0
        if self.cores.threads is None:
            weighed = 16 * p * d + 16 * r * d if self.metric else 0
            return turned + 2 * seen + blocks.experts * (12 * p * d + 28 * p * r + 32 * r * d + 80 * r * r + weighed)
        seen += 8 * p * d + 8 * r * d if self.metric else 0
        return turned + self.cores.threads * (4 * p * d + 20 * p * r + 12 * r * d + 40 * r * r + seen)

    def peak(self, blocks: Blocks) -> int:
        """Of all stages."""
        return max(self.peaks(blocks).values())

    def peaks(self, blocks: Blocks) -> dict[str, int]:
        """Of every stage."""
        fit = max(self.loop(blocks), self.dictionary(blocks))
        found = {"seeds": self.seeds(blocks), "loops": fit, "joint": self.joint(blocks), "write": self.writing(blocks)}
        if self.shape.storage.atoms is not None:
            found["round"] = self.rounding(blocks)
        return {stage: self.base + size for stage, size in found.items()}

    def rounding(self, blocks: Blocks) -> int:
        """Of atoms: the bank, what is left of it, integers; and passes in which codes are fitted anew."""
        rounding = 4 * self.bank + 32 * self.family.d**2 + self.metric
        if fits_jointly(self.settings):
            rounding = max(rounding + 8 * self.shape.bank * self.shape.rank**2, self.joint(blocks) + self.bank)
        return max(rounding, self.loop(blocks) + self.bank)

    def writing(self, blocks: Blocks) -> int:
        """Of the stored left factors."""
        return max(self.bank, self.stored) + self.metric + self.workers(blocks)

    def _at_once(self, blocks: Blocks) -> int:
        return blocks.experts if self.cores.threads is None else self.cores.threads

    def seeds(self, blocks: Blocks) -> int:
        gram = 8 * 8 * len(self.family) ** 2
        sketches = 0  # before there is a bank
        if self.settings.method in ("grouped-subspace", "auto"):
            sketches = 4 * len(self.family) * SKETCH_COLUMNS * self.family.d + gram
        weights = 4 * self.family.p * self.family.d * self._at_once(blocks)
        return max(sketches, 2 * self.bank) + max(gram, 3 * blocks.proxy_bytes) + weights

    def loop(self, blocks: Blocks) -> int:
        p, d, r = self.family.p, self.family.d, self.shape.rank
        read = 3 * p * d * self.family.bytes_per_weight
        made = 4 * r * d * (3 if self.left_grams else 2) + (4 * r * r if self.left_grams else 0)
        banks = 2 if self.loops > 0 else 1
        return banks * self.bank + self.left_grams + self.metric + blocks.experts * (read + made) + self.workers(blocks)

    def dictionary(self, blocks: Blocks) -> int:
        if self.loops == 0:
            return 0
        if not self.left_grams:
            return 2 * self.bank + self.metric + (128 << 20)
        r, m, d = self.shape.rank, self.shape.bank, self.family.d
        if self.metric:
            room = 12 * r * d * min(blocks.experts, len(self.family))
            return _BANKS_IN_METRIC * self.bank + self.left_grams + 2 * self.metric + 24 * d * d + 4 * m * r * r + room
        columns = r * blocks.columns * (8 * 4 * m + 3 * 4 * EXPERTS_AT_ONCE)
        return 2 * self.bank + self.left_grams + 4 * m * r * r + columns + 4 * EXPERTS_AT_ONCE * r * r

    @property
    def _banks(self) -> int:
        """Of the joint fit: the five of a step are of a rank's own atoms; it sends and receives two."""
        together = ranks.size()
        return _BANKS * self.bank if together == 1 else (_BANKS - 5 + 2) * self.bank + 5 * self.bank // together

    def joint(self, blocks: Blocks) -> int:
        if not fits_jointly(self.settings):
            return 0
        count, p, d, r, m = len(self.family), self.family.p, self.family.d, self.shape.rank, self.shape.bank
        weighed = self.metric > 0
        held = kept(self.family, self.shape, self.settings, self.cores.solver_bytes, blocks.cached)
        curvature = 12 * count * m * m + 4 * m * r * r + 24 * d * d + 8 * r * r
        moments = 4 * self.family.layers * d * d if weighed else 0
        hidden = d if keeps_columns(weighed, r, d) else r
        probes = 4 * r * (min(m, PROBED) * d + 3 * m * SKETCHED)
        read = 3 * p * d * self.family.bytes_per_weight
        hand = read + held.buffer + 4 * p * d + 12 * r * d + 8 * r * r + 4 * hidden * d + 4 * d * SKETCHED
        work = self._at_once(blocks) * (8 * p * d + 8 * p * r + 44 * r * d + 40 * r * r + 12 * d * d + probes)
        copies = self.bank if self.cores.solver_bytes < 4 else 0  # of the bank and a vector
        return self._banks + copies + curvature + moments + held.in_memory + self.metric + blocks.experts * hand + work


def _advice(cost: _Cost, least: Blocks, limit: int, found: str) -> str:
    """What is needed beyond what was `found`, and what would do."""
    shape, bank, settings, needed = cost.shape, cost.shape.bank, cost.settings, cost.peak(least)
    while bank > 1 and replace(cost, shape=replace(shape, bank=bank)).peak(least) > limit:
        bank -= max(1, bank // 20)
    there = cost.base == DEVICE_BASE
    remedies = ["--device cpu" if there else f"--max-memory {size_text(needed)}"]
    if replace(cost, shape=replace(shape, bank=bank)).peak(least) <= limit:
        several = settings.share_families or settings.scope != "global"
        remedies.append("a smaller --bank-size" if several else f"--bank-size {bank}")
    aligned = replace(cost, settings=replace(settings, mod="aligned")).peak(least)
    if cost.left_grams and aligned <= limit:
        remedies.append("--mod aligned")
    alternate = replace(cost, settings=replace(settings, solver="alternate")).peak(least)
    if alternate <= limit:
        remedies.append("--solver alternate")
    return (
        f"{found}; family {cost.family.name} ({len(cost.family)} experts, rank {shape.rank}, bank {shape.bank}) needs "
        f"at least {size_text(needed)}{' there, two experts at a time' if there else ''}; use {' or '.join(remedies)}"
    )


def size_text(size: int) -> str:
    """A size as `--max-memory` takes it, in GiB or, below one, MiB, rounded up."""
    return f"{-(-size // 2**20)}MiB" if size <= 1023 << 20 else f"{-(-size * 10 // 2**30) / 10:g}GiB"
