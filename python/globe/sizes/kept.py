"""What the joint fit keeps of every expert of a pool between its passes: bytes in memory, and in scratch files."""

from __future__ import annotations

from dataclasses import dataclass

from globe.checkpoint.family import Family
from globe.compute import ranks
from globe.settings import Settings
from globe.sizes.flops import keeps_columns
from globe.sizes.ratios import Shape


@dataclass(frozen=True)
class Kept:
    """Bytes that lie in memory, on disk, and that reading those back takes for an expert in hand."""

    in_memory: int
    on_disk: int
    buffer: int


def kept(family: Family, shape: Shape, settings: Settings, solver_bytes: int, cached: int) -> Kept:
    """C_i (r × r), K_i (d × d) or a basis (r × d), and W'_i (p × d; fp32) of a rank's experts.

    Parameters
    ----------
    family, shape
    settings : Settings
        `solver` and `outer_loops`: nothing is kept where there is no joint fit. `calibrate`: what might be measured
        may also not be, so the larger of both counts.
    solver_bytes : int
        Of a number of C_i where K_i is kept, and of K_i.
    cached : int
        Bytes that may lie in memory. Each kind does where it still fits, one after the other; the rest is on disk.
    """
    if not fits_jointly(settings):
        return Kept(0, 0, 0)
    weighed = {"none": (False,), "auto": (False, True)}.get(settings.calibrate, (True,))
    found = [_placed(_sizes(family, shape, solver_bytes, each), ranks.most_dealt(family), cached) for each in weighed]
    return Kept(*(max(column) for column in zip(*found, strict=True)))


def fits_jointly(settings: Settings) -> bool:
    """Whether there is a joint fit at all: without loops seeds are kept as they are, with either solver."""
    return settings.solver == "joint" and settings.outer_loops > 0


def _sizes(family: Family, shape: Shape, solver_bytes: int, weighed: bool) -> list[int]:
    """Bytes of an expert, in the order in which room is given."""
    p, d, r = family.p, family.d, shape.rank
    if keeps_columns(weighed, r, d):
        return [solver_bytes * r * r, solver_bytes * d * d, 4 * p * d]
    return [4 * r * r, 4 * r * d, 4 * p * d]


def _placed(sizes: list[int], count: int, cached: int) -> tuple[int, int, int]:
    in_memory = on_disk = buffer = 0
    for size in sizes:
        if count * size <= cached - in_memory:
            in_memory += count * size
        else:
            on_disk += count * size
            buffer += 3 * size
    return in_memory, on_disk, buffer
