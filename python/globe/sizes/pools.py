"""Which experts share a bank: a pool is one family or all of them, of all layers or of a group of layers."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from globe.checkpoint.family import Family
from globe.checkpoint.formats.packed import Packing
from globe.errors import UsageError
from globe.settings import Settings
from globe.sizes.ratios import Shape, Storage


@dataclass(frozen=True)
class Size:
    """What a unit may use: rank r, and atoms m, to be dealt to its groups of layers."""

    rank: int
    bank: int


def units(families: Mapping[str, Family], settings: Settings) -> dict[str, Family]:
    """What is sized as one: each family, or with `share_families` all of them together, in order of layers.

    Raises
    ------
    UsageError
        If families that are to share a bank differ in shape or dtype.
    """
    if not settings.share_families or len(families) == 1:
        return dict(families)
    first, *others = families.values()
    for other in others:
        if (other.p, other.d, other.dtype) != (first.p, first.d, first.dtype):
            raise UsageError(
                f"share_families: family {first.name} has {first.p} × {first.d} matrices of {first.dtype}, "
                f"{other.name} {other.p} × {other.d} of {other.dtype}; one bank needs equal ones"
            )
    order = {name: place for place, name in enumerate(families)}
    experts = [expert for family in families.values() for expert in family.experts]
    experts.sort(key=lambda expert: (expert.layer, order[expert.family], expert.expert))
    return {"+".join(families): Family("+".join(families), tuple(experts), first.p, first.d)}


def sizes(whole: Mapping[str, Family], families: Mapping[str, Family], settings: Settings) -> dict[str, Size]:
    """The size of every unit that `settings` ask for; families that share a bank put their atoms together."""
    asked = {}
    for name, unit in whole.items():
        bank = sum(settings.resolve_bank(len(families[family])) for family in unit.families)
        asked[name] = Size(settings.resolve_rank(unit.p, unit.d), bank)
    return asked


def groups(unit: Family, scope: str | int) -> list[Family]:
    """A unit split into groups of `scope` consecutive layers (those without routed experts do not count)."""
    layers = sorted({expert.layer for expert in unit.experts})
    width = {"global": len(layers), "layer": 1}.get(str(scope)) or int(scope)
    if width >= len(layers):
        return [unit]
    split = []
    for start in range(0, len(layers), width):
        held = layers[start : start + width]
        experts = tuple(expert for expert in unit.experts if held[0] <= expert.layer <= held[-1])
        which = f"layer-{held[0]}" if len(held) == 1 else f"layers-{held[0]}-{held[-1]}"
        split.append(replace(unit, name=f"{unit.name}.{which}", experts=experts))
    return split


def deal(atoms: int, counts: Sequence[int]) -> list[int]:
    """Deal atoms to groups of so many experts: one to each, then always one where it serves the most experts.

    Raises
    ------
    UsageError
        If there are fewer atoms than groups.
    """
    if atoms < len(counts):
        raise UsageError(
            f"bank size is {atoms}, with {len(counts)} groups of layers; expected at least an atom for each: "
            f"use --bank-size {len(counts)} or larger groups (--scope)"
        )
    dealt = [1] * len(counts)
    waiting = [(-float(count), place) for place, count in enumerate(counts)]
    heapq.heapify(waiting)
    for _ in range(atoms - len(counts)):
        place = waiting[0][1]
        dealt[place] += 1
        heapq.heapreplace(waiting, (-counts[place] / dealt[place], place))
    return dealt


def pools(
    whole: Mapping[str, Family], asked: Mapping[str, Size], settings: Settings
) -> tuple[dict[str, Family], dict[str, Shape]]:
    """The pools of all units by name, and their shapes: a unit's atoms are dealt to its groups, whatever the scope.

    So the stored bytes are those of one bank for all layers.
    """
    found, shapes = {}, {}
    for name, unit in whole.items():
        split = groups(unit, settings.scope)
        for pool, bank in zip(split, deal(asked[name].bank, [len(pool) for pool in split]), strict=True):
            found[pool.name] = pool
            support = settings.expected_support(bank)
            shapes[pool.name] = Shape(asked[name].rank, bank, len(pool) * support, storage(settings))
    return found, shapes


def storage(settings: Settings) -> Storage:
    """How the settings ask for factors to be stored."""
    lefts, atoms = (None if bits == 16 else Packing(bits, settings.group_size) for bits in settings.stored_bits)
    return Storage(lefts, atoms)


def require_groups(family: Family, shape: Shape) -> None:
    """Refuse packed factors whose groups do not divide a rank, or the inputs of an atom.

    Raises
    ------
    UsageError
        Says what would do.
    """
    lefts, atoms = shape.storage.lefts, shape.storage.atoms
    if lefts is not None and shape.rank % lefts.group:
        near = shape.rank // lefts.group * lefts.group or lefts.group
        raise UsageError(
            f"family {family.name}: rank is {shape.rank}, which groups of {lefts.group} do not divide, as left factors "
            f"of {lefts.bits} bits need; use --rank {near}, another --group-size, or --left-bits 16"
        )
    if atoms is not None and family.d % atoms.group:
        raise UsageError(
            f"family {family.name}: its matrices have {family.d} columns, which groups of {atoms.group} do not divide, "
            f"as atoms of {atoms.bits} bits need; use another --group-size, or --atom-bits 16"
        )
