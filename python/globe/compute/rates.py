"""What this machine does in a second, from a short timed probe of its products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from globe.compute.forms import per_core, wide_dtype
from globe.compute.passes import engine

READING = 1e9  # bytes a second of a disk, where nothing was read yet
WRITING = 5e8
_SECONDS = 0.4  # of a probe of one kind
_COPIED = 32 << 20  # bytes, more than a core's cache
_CALLS, _TINY = 256, 12  # calls that are timed, and operations in each, as in one for an expert


@dataclass(frozen=True)
class Rates:
    """Operations a second in fp32, fp64 and the solver's dtype, bytes a second through memory, seconds of a call, bytes
    a second of the disk.

    All cores (or the device) together; a call is what one expert takes beside its products.
    """

    products: float
    wide: float
    solver: float
    memory: float
    call: float
    reading: float = READING
    writing: float = WRITING


def probe(device: torch.device, threads: int, shape: tuple[int, int, int], solver: torch.dtype) -> Rates:
    """Time products and copies on a device, or with a core for each of so many threads, in under two seconds.

    Parameters
    ----------
    device : torch.device
    threads : int
        CPU threads to work with.
    shape : tuple of int
        (p, d, r): products of p × d and d × r matrices are timed, as the fit makes them.
    solver : torch.dtype
        Of conjugate gradients' products, r × d and d × d.
    """
    p, d, r = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).to(device) for size in ((p, d), (d, r)))
    wide = right.mT.to(wide_dtype(device)).contiguous()
    narrow, square = right.mT.to(solver).contiguous(), torch.zeros(d, d, dtype=solver, device=device)
    source = torch.zeros(_COPIED // 4, device=device)
    target = [torch.empty_like(source) for _ in range(threads if per_core(device) else 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = _rate(device, len(target), lambda place: torch.mm(left, right), 2 * p * d * r)
        doubles = _rate(device, len(target), lambda place: torch.mm(wide, wide.mT), 2 * r * r * d)
        inner = _rate(device, len(target), lambda place: torch.mm(narrow, square), 2 * r * d * d)
        memory = _rate(device, len(target), lambda place: target[place].copy_(source), 2 * _COPIED)
        call = _call(device)
    finally:
        torch.set_num_threads(before)
    return Rates(products, doubles, inner, memory, call)


def _rate(device: torch.device, workers: int, work: Callable[[int], object], amount: float) -> float:
    """`amount` times the calls a second of all workers, each of which calls until the time is up."""

    def repeat(part: slice) -> float:
        work(part.start)
        _wait(device)
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < _SECONDS or count == 0:
            work(part.start)
            _wait(device)
            count += 1
        return count / elapsed

    with engine(device) as pool:
        return amount * sum(calls for _, calls in pool.map(repeat, workers))


def _call(device: torch.device) -> float:
    """Seconds of a call of a few operations that have nothing to do."""
    small = torch.ones(1, 8, 8, device=device)

    def touch(part: slice) -> None:
        for _ in range(_TINY):
            small.square()

    with engine(device) as pool:
        pool.run(touch, 8)
        started = time.perf_counter()
        pool.run(touch, _CALLS)
        _wait(device)
        return (time.perf_counter() - started) / _CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
