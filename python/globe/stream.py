"""Experts as they pass: read ahead on a thread while the last ones are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from globe.checkpoint import Family

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
    """One pass over a family: `size` experts at a time, (n, p, d) in the checkpoint's dtype on the device."""
    spans = [slice(batch.start, batch.stop) for batch in family.batches(size)]
    readings = ahead(lambda span=span: family.read_some(span) for span in spans)  # type: ignore[misc]
    for span, weights in zip(spans, readings, strict=True):
        yield span, weights.to(device)
