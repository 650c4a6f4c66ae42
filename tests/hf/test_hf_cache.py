"""The cache of mixtures against a plain model of it, within its budget, and under many threads."""

from __future__ import annotations

import copy
import random
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from globe.errors import UsageError  # noqa: E402
from globe.hf import MixtureCache  # noqa: E402

SIZES = {key: 1 + key % 4 for key in range(10)}


def make(key: int) -> torch.Tensor:
    return torch.full((SIZES[key],), key, dtype=torch.uint8)


@given(st.integers(0, 12), st.lists(st.integers(0, 9), max_size=60), st.integers(0, 12))
def test_it_is_the_least_recently_used_that_goes(budget: int, asked: list[int], later: int) -> None:
    cache, held, hits, evicted = MixtureCache(budget), list[int](), 0, 0

    def fit(limit: int) -> None:
        nonlocal evicted
        while sum(SIZES[key] for key in held) > limit:
            held.pop(0)
            evicted += 1

    for key in asked:
        assert cache.get(key, lambda key=key: make(key)).tolist() == [key] * SIZES[key]  # type: ignore[misc]
        if key in held:
            hits += 1
            held.remove(key)
            held.append(key)
        elif SIZES[key] <= budget:
            fit(budget - SIZES[key])
            held.append(key)
        stats = cache.stats()
        assert cache.keys() == held
        assert stats.bytes == sum(SIZES[key] for key in held) <= budget
        assert (stats.hits, stats.evictions, stats.entries) == (hits, evicted, len(held))
        assert stats.hits + stats.misses > 0
    assert cache.stats().misses == len(asked) - hits
    assert cache.stats().hit_rate == (hits / len(asked) if asked else 0)
    cache.resize(later)
    fit(later)
    assert cache.keys() == held


def test_all_keeps_everything_and_nothing_keeps_nothing() -> None:
    for budget, kept in (("all", 10), (None, 10), (0, 0), ("4B", 1)):
        cache = MixtureCache(budget)
        for key in (*range(10), 3):
            cache.get(key, lambda key=key: make(key))  # type: ignore[misc]
        assert cache.stats().entries == kept


@pytest.mark.parametrize("budget", ["many", -1, True, 1.5, "2 loaves"])
def test_what_is_no_budget(budget: object) -> None:
    with pytest.raises(UsageError, match="cache is"):
        MixtureCache(budget)  # type: ignore[arg-type]


def test_an_error_leaves_it_as_it_was() -> None:
    cache = MixtureCache(8)
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: torch.zeros(1 // 0))
    assert cache.get(1, lambda: make(1)).tolist() == [1, 1]
    assert cache.stats().entries == 1


def test_a_copy_has_the_budget_and_none_of_the_entries() -> None:
    cache = MixtureCache(9)
    cache.get(1, lambda: make(1))
    copied = copy.deepcopy(cache)
    assert (copied.stats().budget, copied.stats().entries, copied.stats().misses) == (9, 0, 0)


@pytest.mark.parametrize("budget", [0, 5, 12, "all"])
def test_threads(budget: int | str) -> None:
    cache, wrong, over = MixtureCache(budget), list[int](), list[int]()
    start = threading.Barrier(8)

    def hammer(seed: int) -> None:
        chosen = random.Random(seed)
        start.wait()
        for turn in range(400):
            key = chosen.randrange(10)
            if cache.get(key, lambda key=key: make(key)).tolist() != [key] * SIZES[key]:
                wrong.append(key)
            if isinstance(budget, int) and cache.stats().bytes > budget:
                over.append(key)
            if turn % 100 == 50:
                cache.resize(budget)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert not wrong and not over
    assert stats.hits + stats.misses == 8 * 400
    assert stats.bytes == sum(SIZES[key] for key in cache.keys())  # type: ignore[index]
    assert stats.entries == (10 if budget == "all" else len(cache.keys()))
