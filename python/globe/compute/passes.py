"""The engine of passes over experts, in two forms: an expert to a core, or a batch of them on a device.

The third form, many processes that each pass over experts of their own, lies around it (:mod:`globe.compute.ranks`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from globe.compute.forms import per_core
from globe.compute.stream import ahead

Given = TypeVar("Given")
Value = TypeVar("Value")
_ROW = 4  # experts at most that are handed to a core at once, and tasks at least for each core


class Engine(ABC):
    """Calls work on the experts (atoms, blocks) in hand, by parts; the form says which parts.

    Work is written for n of them at once and is right for any n, so no caller knows the form. On a device nothing
    in it may make the host wait: no `float`, `bool`, `item` or `cpu` of a tensor there.
    """

    @abstractmethod
    def map(self, work: Callable[[slice], Value], count: int) -> Iterator[tuple[slice, Value]]:
        """Parts of 0 to `count` in order, each with what `work` made of it."""

    def run(self, work: Callable[[slice], None], count: int) -> None:
        """Call `work` for what it writes."""
        for _ in self.map(work, count):
            pass

    def meanwhile(self, jobs: Iterable[Callable[[], Value]]) -> Iterator[Value]:
        """The jobs' results in order; where the host computes, the next is made while the caller has the last."""
        return (job() for job in jobs)


class PerCore(Engine):
    """One expert a call, every call on one core.

    Two experts on a core each finish sooner than one after the other on both cores, and no result depends on the
    number of threads.
    """

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self._threads = pool, threads

    def map(self, work: Callable[[slice], Value], count: int) -> Iterator[tuple[slice, Value]]:
        """As :meth:`Engine.map`, as they are ready; gradients are followed if they are at the caller's."""
        parts = [slice(k, k + 1) for k in range(count)]
        yield from zip(parts, self._pool.map(_following(work), parts), strict=True)

    def run(self, work: Callable[[slice], None], count: int) -> None:
        """As :meth:`Engine.run`, some experts in a row for each task: handing over takes as long as a small product."""
        row = max(1, min(_ROW, count // (_ROW * self._threads)))
        rows = [range(first, min(count, first + row)) for first in range(0, count, row)]

        def in_a_row(numbers: range) -> None:
            for k in numbers:
                work(slice(k, k + 1))

        for _ in self._pool.map(_following(in_a_row), rows):
            pass

    def meanwhile(self, jobs: Iterable[Callable[[], Value]]) -> Iterator[Value]:
        """As :meth:`Engine.meanwhile`."""
        return ahead(jobs)


def _following(work: Callable[[Given], Value]) -> Callable[[Given], Value]:
    """The work on another thread, where gradients are followed if they are here."""
    followed = torch.is_grad_enabled()

    def there(given: Given) -> Value:
        with torch.set_grad_enabled(followed):
            return work(given)

    return there


class Batched(Engine):
    """All in hand in one call on the caller's thread, which drives the device."""

    def map(self, work: Callable[[slice], Value], count: int) -> Iterator[tuple[slice, Value]]:
        """As :meth:`Engine.map`."""
        if count:
            yield slice(0, count), work(slice(0, count))


@contextmanager
def engine(device: torch.device) -> Iterator[Engine]:
    """The engine of a device, while its threads live; torch's threads are as before after it."""
    if not per_core(device):
        yield Batched()
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "globe-work", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield PerCore(pool, threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # which the workers have set for threads to come


def shifted(span: slice, places: int) -> slice:
    """A span so many places further on."""
    return slice(span.start + places, span.stop + places)


def within(span: slice, part: slice) -> slice:
    """The numbers of a part of the experts in hand, `span` being theirs."""
    return slice(span.start + part.start, span.start + part.stop)
