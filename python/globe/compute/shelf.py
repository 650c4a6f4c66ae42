"""Matrices of many experts, kept between passes: on the device, or in a scratch file that is read ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from globe.compute.passes import shifted
from globe.compute.stream import Lane, Sent, ahead

_BUFFERS = 3


class Shelf(Protocol):
    """Matrices of one shape and dtype of some experts, written and read by runs of their numbers."""

    def put(self, some: slice, matrices: torch.Tensor) -> None:
        """Keep those of the experts of these numbers; `matrices` may be overwritten afterwards."""

    def take(self, spans: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Those of runs of experts, one run after the other; overwritten once the next but one is asked for."""


class InMemory:
    """A shelf of tensors on a device.

    Parameters
    ----------
    shape : tuple of int
        (n, k, l).
    device : torch.device
    first : int
        The number of the first expert.
    dtype : torch.dtype
        In which they are kept, and come back.
    """

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, first: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self._kept, self._first = torch.empty(shape, dtype=dtype, device=device), first

    def put(self, some: slice, matrices: torch.Tensor) -> None:
        """As :meth:`Shelf.put`."""
        self._kept[shifted(some, -self._first)] = matrices

    def take(self, spans: Sequence[slice]) -> Iterator[torch.Tensor]:
        """As :meth:`Shelf.take`."""
        return (self._kept[shifted(span, -self._first)] for span in spans)


class OnDisk:
    """A shelf in a scratch file, whose removal is the caller's.

    Parameters
    ----------
    shape : tuple of int
        (n, k, l).
    device : torch.device
        Where matrices come from, and are taken to.
    file : Path
    first : int
        The number of the first expert.
    dtype : torch.dtype
        In which they are kept, and come back.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        file: Path,
        first: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shape, self._dtype, self._lane = shape[1:], dtype, Lane(device)
        self._stride = dtype.itemsize * shape[1] * shape[2]
        self._file, self._first = file, first
        with open(file, "wb") as made:
            made.truncate(shape[0] * self._stride)
        self._buffers: list[torch.Tensor] = []

    def put(self, some: slice, matrices: torch.Tensor) -> None:
        """As :meth:`Shelf.put`."""
        left, place = _bytes(matrices.to(self._dtype).cpu().contiguous()), (some.start - self._first) * self._stride
        with open(self._file, "r+b", buffering=0) as file:
            while left:  # the system takes at most 2 GiB at a time
                written = os.pwrite(file.fileno(), left, place)
                if not written:
                    raise OSError(f"{self._file}: {len(left)} bytes of a batch cannot be written; is the disk full?")
                left, place = left[written:], place + written

    def take(self, spans: Sequence[slice]) -> Iterator[torch.Tensor]:
        """As :meth:`Shelf.take`."""
        largest = max((span.stop - span.start for span in spans), default=0)
        if not self._buffers or len(self._buffers[0]) < largest:
            self._buffers = [self._lane.memory((largest, *self._shape), self._dtype) for _ in range(_BUFFERS)]
        with open(self._file, "rb", buffering=0) as file:

            def reading(place: int) -> Callable[[], Sent]:
                def fill(out: torch.Tensor) -> torch.Tensor:
                    span = spans[place]
                    part = out[: span.stop - span.start]
                    left, start = _bytes(part), (span.start - self._first) * self._stride
                    while left:
                        found = os.preadv(file.fileno(), [left], start)
                        if not found:
                            raise OSError(f"{self._file}: ends before expert {span.stop - 1}")
                        left, start = left[found:], start + found
                    return part

                return lambda: self._lane.send(fill, self._buffers[place % _BUFFERS])

            for sent in ahead(map(reading, range(len(spans)))):
                yield self._lane.take(sent)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    found: memoryview = tensor.view(torch.uint8).numpy().reshape(-1).data
    return found


class Shelves:
    """Makes shelves: in memory while it lasts, then in a folder.

    Parameters
    ----------
    device : torch.device
    size : int
        Bytes of the device's memory for all of them.
    folder : Path
        For files; the caller removes it.
    """

    def __init__(self, device: torch.device, size: int, folder: Path) -> None:
        self._device, self._left, self._folder = device, size, folder
        self._made = 0

    def make(self, shape: tuple[int, int, int], first: int = 0, dtype: torch.dtype = torch.float32) -> Shelf:
        """A shelf of (n, k, l) matrices, of experts from the number `first` on: those made first lie in memory."""
        size = dtype.itemsize * shape[0] * shape[1] * shape[2]
        if size <= self._left:
            self._left -= size
            return InMemory(shape, self._device, first, dtype)
        self._made += 1
        return OnDisk(shape, self._device, self._folder / f"shelf-{self._made}", first, dtype)
