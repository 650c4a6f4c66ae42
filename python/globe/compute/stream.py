"""Experts as they pass: read ahead on a thread, worked on one per core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from globe.checkpoint.family import Family

Value = TypeVar("Value")


def ahead(jobs: Iterable[Callable[[], Value]]) -> Iterator[Value]:
    """The jobs' results in order; the next job runs on a thread of its own while the caller has the last result."""
    with ThreadPoolExecutor(1, thread_name_prefix="globe-read") as reader:
        pending: Future[Value] | None = None
        try:
            for job in jobs:
                started = reader.submit(job)
                if pending is not None:
                    yield pending.result()
                pending = started
            if pending is not None:
                yield pending.result()
        finally:
            reader.shutdown(cancel_futures=True)


def expert_batches(family: Family, size: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """One pass over a family: `size` experts at a time, (n, p, d) in the checkpoint's dtype on the device.

    The tensor in hand is overwritten once the next but one is asked for.
    """
    spans = [slice(batch.start, batch.stop) for batch in family.batches(size)]
    buffers = [torch.empty(min(size, len(family)), family.p, family.d, dtype=family.dtype) for _ in range(3)]

    def reading(number: int) -> Callable[[], torch.Tensor]:
        return lambda: family.read_some(spans[number], buffers[number % len(buffers)])

    for span, weights in zip(spans, ahead(map(reading, range(len(spans)))), strict=True):
        yield span, weights.to(device)


class Workers:
    """Calls a function for many experts at a time, every call on one core.

    Two experts on a core each finish sooner than one after the other on both cores, and no result depends on the
    number of threads. On CUDA and MPS the device is the one worker, and the caller's thread drives it.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            self._pool = ThreadPoolExecutor(
                self._threads, "globe-work", initializer=torch.set_num_threads, initargs=(1,)
            )

    def __enter__(self) -> Workers:
        return self

    def map(self, work: Callable[[int], Value], count: int) -> Iterator[Value]:
        """work(0), work(1), … work(count - 1), in that order as they are ready."""
        yield from map(work, range(count)) if self._pool is None else self._pool.map(work, range(count))

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # which the workers have set for threads to come
