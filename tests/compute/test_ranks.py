"""What is dealt to ranks: everything once, in order, by whole layers where there are enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from globe.checkpoint.family import Family  # noqa: E402
from globe.compute import ranks  # noqa: E402
from globe.errors import GlobeError  # noqa: E402


def family(layers: list[int]) -> Family:
    """A family with so many experts in each layer."""
    experts: list[Any] = [SimpleNamespace(layer=layer) for layer, count in enumerate(layers) for _ in range(count)]
    return Family("gate", tuple(experts), 4, 6)


def each(count: int, work: Any) -> list[Any]:
    """What `work` gives at each of so many ranks."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "size", lambda: count)
        for number in range(count):
            patch.setattr(ranks, "rank", lambda number=number: number)
            found.append(work())
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_every_expert_is_dealt_once(layers: list[int], count: int) -> None:
    experts = family(layers)
    spans = each(count, lambda: ranks.dealt(experts))
    assert [number for span in spans for number in range(span.start, span.stop)] == list(range(len(experts)))
    assert each(count, lambda: ranks.most_dealt(experts)) == [max(span.stop - span.start for span in spans)] * count
    if count <= len(layers):
        ends = {0, *np.cumsum(layers).tolist()}
        assert {span.stop for span in spans} <= ends


@given(st.integers(1, 12), st.integers(1, 12))
def test_layers_alike_are_dealt_evenly(layers: int, count: int) -> None:
    if count > layers:
        return
    sizes = [span.stop - span.start for span in each(count, lambda: ranks.dealt(family([4] * layers)))]
    assert max(sizes) - min(sizes) <= 4


@given(st.integers(0, 40), st.integers(1, 9))
def test_atoms_and_items_are_dealt_once(atoms: int, count: int) -> None:
    spans = each(count, lambda: ranks.atoms(atoms))
    assert [number for span in spans for number in range(span.start, span.stop)] == list(range(atoms))
    shares = each(count, lambda: ranks.share(range(atoms)))
    assert sorted(number for share in shares for number in share) == list(range(atoms))


def test_without_others_nothing_is_exchanged() -> None:
    total, before = torch.arange(6.0).view(3, 2), ranks.sent()
    assert ranks.summed(total) is total and ranks.scattered(total) is total and ranks.assembled(total, 3) is total
    assert ranks.gathered("here") == ["here"] and ranks.agreed(0.25) == 0.25 and ranks.lead(lambda: "led") == "led"
    with pytest.raises(GlobeError, match="alone"), ranks.together():
        raise GlobeError("alone")
    assert ranks.sent() == before
