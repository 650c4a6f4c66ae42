"""Who shares a bank: groups of layers and families, and how many atoms each pool is dealt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import write_checkpoint
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.errors import UsageError
from globe.settings import Settings
from globe.sizes.pools import Size, deal, groups, pools, sizes, units
from globe.sizes.ratios import stored_elements

LAYERS, EACH = 5, 4


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    rng = np.random.default_rng(0)
    gate, up = (rng.standard_normal((LAYERS * EACH, 6, 8)) for _ in range(2))
    down = rng.standard_normal((LAYERS * EACH, 8, 6))
    directory = tmp_path_factory.mktemp("pools") / "source"
    checkpoint = Checkpoint(write_checkpoint(directory, layers=LAYERS, gate=gate, up=up, down=down))
    return {name: checkpoint.family(name) for name in ("gate", "up", "down")}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.data())
def test_atoms_dealt(counts: list[int], data: st.DataObject) -> None:
    atoms = data.draw(st.integers(len(counts), sum(counts)))
    dealt = deal(atoms, counts)
    assert sum(dealt) == atoms
    assert all(1 <= mine <= count for mine, count in zip(dealt, counts, strict=True))
    served = [count / mine for mine, count in zip(dealt, counts, strict=True)]
    for mine, count in zip(dealt, counts, strict=True):  # no atom would serve more experts elsewhere
        assert mine == 1 or count / (mine - 1) >= max(served)


def test_too_few_atoms() -> None:
    with pytest.raises(UsageError, match="^bank size is 2, with 3 groups of layers; .*--bank-size 3"):
        deal(2, [4, 4, 4])


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("global", ["gate"]),
        (9, ["gate"]),
        (LAYERS, ["gate"]),
        (2, ["gate.layers-0-1", "gate.layers-2-3", "gate.layer-4"]),
        ("layer", [f"gate.layer-{layer}" for layer in range(LAYERS)]),
        (1, [f"gate.layer-{layer}" for layer in range(LAYERS)]),
    ],
)
def test_groups_of_layers(scope: str | int, names: list[str], families: dict[str, Family]) -> None:
    split = groups(families["gate"], scope)
    assert [pool.name for pool in split] == names
    assert tuple(expert for pool in split for expert in pool.experts) == families["gate"].experts


def test_layers_without_experts_do_not_count(families: dict[str, Family]) -> None:
    some = replace(families["gate"], experts=tuple(e for e in families["gate"].experts if e.layer in (0, 2, 3)))
    assert [pool.name for pool in groups(some, 2)] == ["gate.layers-0-2", "gate.layer-3"]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer", 2])
def test_stored_bytes_do_not_depend_on_who_shares(scope: str | int, share: bool, families: dict[str, Family]) -> None:
    settings = Settings(rank=3, bank_size=7, support=2, scope=scope, share_families=share)  # type: ignore[arg-type]
    whole = units(families, settings)
    asked = sizes(whole, families, settings)
    assert asked == ({"gate+up+down": Size(3, 21)} if share else dict.fromkeys(families, Size(3, 7)))
    held, shapes = pools(whole, asked, settings)
    assert list(held) == list(shapes) == [pool.name for pool in held.values()]
    assert sum(len(pool) for pool in held.values()) == 3 * LAYERS * EACH
    assert sum(shape.bank for shape in shapes.values()) == 21
    weights = sum(stored_elements(held[name], replace(shapes[name], nonzeros=0)) for name in held)
    assert weights == pytest.approx(3 * stored_elements(families["gate"], replace(shapes[next(iter(held))], bank=7,
                                                                                 nonzeros=0)), rel=0.05)  # fmt: skip


def test_shared_experts_come_by_layer_and_family(families: dict[str, Family]) -> None:
    chosen = {name: families[name] for name in ("down", "gate")}
    (pool,) = units(chosen, Settings(families=("down", "gate"), share_families=True)).values()
    assert pool.name == "down+gate" and pool.families == ("down", "gate")
    places = [(expert.layer, expert.family, expert.expert) for expert in pool.experts]
    assert places == [(layer, name, e) for layer in range(LAYERS) for name in chosen for e in range(EACH)]
    for number in (0, EACH, len(pool) - 1):
        expert = pool.experts[number]
        there = families[expert.family].experts.index(expert)
        assert (pool.read(number) == families[expert.family].read(there)).all()


def test_families_of_two_shapes_share_nothing(families: dict[str, Family]) -> None:
    odd = {**families, "up": replace(families["up"], p=7)}
    with pytest.raises(UsageError, match="^share_families: family gate has 6 × 8 .*, up 7 × 8"):
        units(odd, Settings(share_families=True))
