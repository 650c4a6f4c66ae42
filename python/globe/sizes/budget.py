"""How much is in hand at a time, so that the process stays below a ceiling of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from globe.checkpoint.family import Family
from globe.compute.blocks import BLOCKS, SMALLEST, Blocks
from globe.errors import UsageError
from globe.machine import control_groups
from globe.settings import Settings
from globe.sizes.ratios import Shape

BASE = 768 << 20  # the interpreter with torch, and freed memory that the allocator keeps
EXPERTS_AT_ONCE = 64  # in the exact dictionary step
_FEW = 8  # experts, for which a pass spends some percent of its time on reading the bank
_BANKS = 4  # of the joint fit beside its pairs, which take one each: the point, its slope, a direction, a trial's slope
_BANKS_IN_METRIC = 7  # of the exact dictionary step in a metric, which solves for the whole bank
SKETCH_COLUMNS = 32  # of an expert, in grouped-subspace
SEEN_GRAM_BYTES = 64 << 20  # of a block of the bank as a layer sees it


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the control group that the process is held in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = control_groups.memory_limit()
    return min(total, held) if held is not None else total


def memory_limit(settings: Settings) -> int:
    """`max_memory`, or half of the machine's."""
    return settings.max_memory if settings.max_memory is not None else machine_memory() // 2


def plan_blocks(
    families: Mapping[str, Family], shapes: Mapping[str, Shape], settings: Settings, threads: int, exact_bytes: int
) -> Blocks:
    """The largest blocks with which no stage is expected above `settings.max_memory`, from the shapes alone.

    Parameters
    ----------
    families, shapes : mapping
        By the name of the family, or of the pool of experts that share a bank.
    settings : Settings
    threads : int
        Experts worked on at the same time.
    exact_bytes : int
        Bytes of a number of A_iᵀA_i, 2 or 4.

    Raises
    ------
    UsageError
        If no block is small enough; says what would fit.
    """
    limit = memory_limit(settings)
    chosen = BLOCKS
    stored = 2 * sum(shapes[name].bank * shapes[name].rank * family.d for name, family in families.items())
    for name, family in families.items():
        cost = _Cost(family, shapes[name], settings, threads, exact_bytes, stored)
        if cost.peak(SMALLEST) > limit:
            raise UsageError(_advice(cost, settings, limit, cost.peak(SMALLEST)))
        for field in ("experts", "columns", "proxy_bytes"):
            while cost.peak(replace(SMALLEST, **{field: getattr(chosen, field)})) > limit:
                chosen = replace(chosen, **{field: getattr(chosen, field) // 2})
        if cost.peak(chosen) > limit:
            chosen = replace(chosen, cached=0)
        for field, least in (("experts", _FEW), ("pairs", 1), ("experts", 1)):
            while cost.peak(chosen) > limit and getattr(chosen, field) > least:
                size = getattr(chosen, field)
                chosen = replace(chosen, **{field: size - 1 if field == "pairs" else size // 2})
    return chosen


@dataclass(frozen=True)
class _Cost:
    """Bytes that the stages of one family hold at their peaks; `stored` is all banks as they are while written."""

    family: Family
    shape: Shape
    settings: Settings
    threads: int
    exact_bytes: int
    stored: int

    @property
    def bank(self) -> int:
        return 4 * self.shape.bank * self.shape.rank * self.family.d

    @property
    def left_grams(self) -> int:
        exact = self.settings.mod == "exact" and self.settings.outer_loops > 0
        return len(self.family) * self.shape.rank**2 * self.exact_bytes if exact else 0

    @property
    def metric(self) -> int:
        """What a metric keeps of layers and experts, where there may be one."""
        if self.settings.calibrate == "none":
            return 0
        p, d, layers = self.family.p, self.family.d, len({expert.layer for expert in self.family.experts})
        return 4 * layers * d * d + 4 * len(self.family) * (d + p * (p if "down" in self.family.families else 1))

    @property
    def workers(self) -> int:
        """What each worker makes of an expert: W, W B̃ᵀ, A and its transpose, A⁺W, r × r matrices in fp64."""
        p, d, r = self.family.p, self.family.d, self.shape.rank
        turned = 2 * p * d * self.family.bytes_per_weight if "down" in self.family.families else 0
        seen = 8 * p * d + 8 * r * d + min(SEEN_GRAM_BYTES, self.bank) if self.metric else 0
        return turned + self.threads * (4 * p * d + 20 * p * r + 12 * r * d + 40 * r * r + seen)

    def peak(self, blocks: Blocks) -> int:
        """Of all stages."""
        stages = (self.seeds(blocks), self.loop(blocks), self.dictionary(blocks), self.joint(blocks), self.writing)
        return BASE + max(stages)

    @property
    def writing(self) -> int:
        return max(self.bank, self.stored) + self.metric + self.workers

    def seeds(self, blocks: Blocks) -> int:
        gram = 8 * 8 * len(self.family) ** 2
        sketches = 0  # before there is a bank
        if self.settings.method in ("grouped-subspace", "auto"):
            sketches = 4 * len(self.family) * SKETCH_COLUMNS * self.family.d + gram
        weights = 4 * self.family.p * self.family.d * self.threads
        return max(sketches, 2 * self.bank) + max(gram, 3 * blocks.proxy_bytes) + weights

    def loop(self, blocks: Blocks) -> int:
        p, d, r = self.family.p, self.family.d, self.shape.rank
        read = 3 * p * d * self.family.bytes_per_weight
        made = 4 * r * d * (3 if self.left_grams else 2) + (4 * r * r if self.left_grams else 0)
        banks = 2 if self.settings.outer_loops > 0 else 1
        return banks * self.bank + self.left_grams + self.metric + blocks.experts * (read + made) + self.workers

    def dictionary(self, blocks: Blocks) -> int:
        if not self.left_grams:
            return 2 * self.bank + self.metric + (128 << 20)
        r, m, d = self.shape.rank, self.shape.bank, self.family.d
        if self.metric:
            room = 12 * r * d * min(blocks.experts, len(self.family))
            return _BANKS_IN_METRIC * self.bank + self.left_grams + 2 * self.metric + 24 * d * d + 4 * m * r * r + room
        columns = r * blocks.columns * (8 * 4 * m + 3 * 4 * EXPERTS_AT_ONCE)
        return 2 * self.bank + self.left_grams + 4 * m * r * r + columns + 4 * EXPERTS_AT_ONCE * r * r

    def joint(self, blocks: Blocks) -> int:
        if self.settings.solver != "joint" or self.settings.outer_loops == 0:
            return 0
        count, p, d, r, m = len(self.family), self.family.p, self.family.d, self.shape.rank, self.shape.bank
        whole = 4 * count * p * d
        banks = (_BANKS + blocks.pairs + 1) * self.bank  # one pair is to come
        curvature = 4 * count * m * m + 4 * m * r * r + 16 * d * d
        read = 3 * p * d * self.family.bytes_per_weight
        made = 4 * p * d + 12 * r * d + 4 * d * d + 12 * r * r + 4 * m * m
        kept = whole if whole <= blocks.cached else 0
        hidden = 20 * self.threads * d * d
        return banks + curvature + blocks.experts * (read + made) + kept + self.metric + hidden + self.workers


def _advice(cost: _Cost, settings: Settings, limit: int, needed: int) -> str:
    shape, bank = cost.shape, cost.shape.bank
    while bank > 1 and replace(cost, shape=replace(shape, bank=bank)).peak(SMALLEST) > limit:
        bank -= max(1, bank // 20)
    remedies = [f"--max-memory {size_text(needed)}"]
    if replace(cost, shape=replace(shape, bank=bank)).peak(SMALLEST) <= limit:
        several = settings.share_families or settings.scope != "global"
        remedies.append("a smaller --bank-size" if several else f"--bank-size {bank}")
    aligned = replace(cost, settings=replace(settings, mod="aligned")).peak(SMALLEST)
    if cost.left_grams and aligned <= limit:
        remedies.append("--mod aligned")
    alternate = replace(cost, settings=replace(settings, solver="alternate")).peak(SMALLEST)
    if alternate <= limit:
        remedies.append("--solver alternate")
    return (
        f"max_memory is {size_text(limit)}; family {cost.family.name} ({len(cost.family)} experts, rank {shape.rank}, "
        f"bank {shape.bank}) needs at least {size_text(needed)}; use {' or '.join(remedies)}"
    )


def size_text(size: int) -> str:
    """A size in GiB as `--max-memory` takes it, rounded up."""
    return f"{-(-size * 10 // 2**30) / 10:g}GiB"
