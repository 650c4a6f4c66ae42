"""Composed mixtures within a budget of bytes; the least recently used make room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from globe.errors import UsageError
from globe.settings import parse_bytes

DEFAULT_BUDGET = "2GiB"


class Sized(Protocol):
    """A tensor, or what else tells its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


_Kept = TypeVar("_Kept", bound=Sized)


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made or cleared, and what it holds.

    `budget` is None where there is none.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    budget: int | None

    @property
    def hit_rate(self) -> float:
        """Hits over all look-ups; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


class MixtureCache:
    """Tensors by key, at most `budget` bytes of them, for any number of threads.

    A tensor above the budget is handed out and not kept. Threads that miss the same key at the same time each make
    the tensor, and the first one made is kept: none waits for another, and all get the same values.

    Parameters
    ----------
    budget : int, str or None
        Bytes, a size such as "2GiB", 0 to keep nothing, "all" or None to keep everything.
    """

    def __init__(self, budget: int | str | None = DEFAULT_BUDGET) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._budget = read_budget(budget)
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """The tensor of a key, made where it is not held."""
        with self._lock:
            held: _Kept | None = self._entries.get(key)
            if held is not None:
                self._hits += 1
                self._entries.move_to_end(key)
                return held
            self._misses += 1
        made = make()
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                first: _Kept = self._entries[key]
                return first
            if self._budget is None or made.nbytes <= self._budget:
                self._make_room(made.nbytes)
                self._entries[key] = made
                self._bytes += made.nbytes
        return made

    def resize(self, budget: int | str | None) -> None:
        """Set another budget; what is held above it is dropped."""
        wanted = read_budget(budget)
        with self._lock:
            self._budget = wanted
            self._make_room(0)

    def get_without_eviction(self, key: Hashable, make: Callable[[], _Kept], size: int) -> _Kept | None:
        """The tensor of a key, made where it is not held but has room with its `size`; None, a miss, elsewhere."""
        with self._lock:
            if key not in self._entries and self._budget is not None and self._bytes + size > self._budget:
                self._misses += 1
                return None
        return self.get(key, make)

    def clear(self) -> None:
        """Drop all entries and start counting anew."""
        with self._lock:
            self._entries.clear()
            self._bytes = self._hits = self._misses = self._evictions = 0

    def keys(self) -> list[Hashable]:
        """What is held, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def stats(self) -> CacheStats:
        """Counts and bytes at this moment."""
        with self._lock:
            counts = (self._hits, self._misses, self._evictions, len(self._entries), self._bytes)
            return CacheStats(*counts, self._budget)

    def _make_room(self, wanted: int) -> None:
        while self._budget is not None and self._entries and self._bytes + wanted > self._budget:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= dropped.nbytes
            self._evictions += 1

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self._budget}  # a copy of a model starts with an empty cache

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"])  # type: ignore[misc]


def read_budget(budget: int | str | None) -> int | None:
    """Bytes of a budget; None for "all".

    Raises
    ------
    UsageError
        If it is neither a number of bytes, a size, nor "all".
    """
    if budget is None or budget == "all":
        return None
    expected = UsageError(f"cache is {budget!r}; expected bytes, a size such as 2GiB, 0, or all")
    if isinstance(budget, str):
        try:
            return parse_bytes(budget)
        except UsageError:
            raise expected from None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise expected
    return budget
