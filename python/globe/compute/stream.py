"""Experts as they pass: read ahead on a thread, and carried to a device meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.family import Family

Value = TypeVar("Value")
_BUFFERS = 3


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


def expert_batches(
    family: Family,
    size: int,
    device: torch.device,
    some: slice | None = None,
    digests: NDArray[np.int64] | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """One pass over a family, or `some` of it: `size` experts at a time, (n, p, d) in the checkpoint's dtype.

    They are on the device; the next ones are read, and on CUDA carried there, while the last are worked on. The tensor
    in hand is overwritten once the next but one is asked for. `digests` (N,) take the CRC-32 of each expert read.
    """
    first, last = (0, len(family)) if some is None else (some.start, some.stop)
    spans = [slice(start, min(start + size, last)) for start in range(first, last, size)]
    shape, lane = (min(size, max(last - first, 0)), family.p, family.d), Lane(device)
    buffers = [lane.memory(shape, family.dtype) for _ in range(_BUFFERS)]

    def fill(span: slice, out: torch.Tensor) -> torch.Tensor:
        if digests is None:
            return family.read_some(span, out)
        for place, number in enumerate(range(span.start, span.stop)):
            digests[number] = family.read_digested(number, out[place])
        return out[: span.stop - span.start]

    def reading(number: int) -> Callable[[], Sent]:
        return lambda: lane.send(partial(fill, spans[number]), buffers[number % _BUFFERS])

    for span, sent in zip(spans, ahead(map(reading, range(len(spans)))), strict=True):
        yield span, lane.take(sent)


Sent = tuple[torch.Tensor, "torch.cuda.Event | None"]


class Lane:
    """The way of tensors to a device.

    To CUDA from pinned memory, on a stream of its own: the thread that sends waits until the memory that it fills has
    been sent; the caller's stream, and never the caller, waits for what it takes. Elsewhere when it is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: dict[int, torch.cuda.Event] = {}

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the host to send from."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, fill: Callable[[torch.Tensor], torch.Tensor], memory: torch.Tensor) -> Sent:
        """Send what `fill` makes in some of the memory, on a thread that reads."""
        before = self._last.pop(memory.data_ptr(), None)
        if before is not None:
            before.synchronize()
        here = fill(memory)
        if self._stream is None:
            return here, None
        with torch.cuda.stream(self._stream):
            there = here.to(self._device, non_blocking=True)
            sent = self._stream.record_event()
        self._last[memory.data_ptr()] = sent
        return there, sent

    def take(self, sent: Sent) -> torch.Tensor:
        """What was sent, on the device, on the caller's thread."""
        there, event = sent
        if event is None:
            return there.to(self._device)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        there.record_stream(stream)  # its memory is not given away before what the caller asks for is done
        return there
