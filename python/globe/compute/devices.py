"""Devices, threads and memory of the process."""

from __future__ import annotations

import ctypes
import os

import torch

from globe import kernels
from globe.compute import ranks
from globe.compute.gemm import matmul
from globe.compute.spd import gram_inverse
from globe.errors import GlobeError, UsageError
from globe.machine.launch import local_rank, local_ranks, sharing
from globe.machine.processors import usable_processors
from globe.machine.waiting import warn_of_spinning

_ROUNDING = 1e-4
_AT_FIRST = torch.get_num_threads()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` value; auto is CUDA, then MPS, then the CPU. Every rank has a GPU of its own.

    Raises
    ------
    UsageError
        If the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise UsageError(f"device {name} is not available here; use --device auto or cpu")
    if name == "cuda" and ranks.size() > 1:
        if local_ranks() > torch.cuda.device_count():
            raise UsageError(
                f"{local_ranks()} ranks on a machine with {torch.cuda.device_count()} GPUs; expected one or more "
                "GPUs for each: use --nproc-per-node gpu, or --device cpu"
            )
        return torch.device("cuda", local_rank())
    return torch.device(name)


def check_device(device: torch.device) -> None:
    """Multiply and factorise matrices on a device and on the CPU.

    The inner dimension is one that took wrong turns on some Macs, whose Cholesky factors did too.

    Raises
    ------
    GlobeError
        If the results differ by more than rounding, or this torch has no Cholesky factors there.
    """
    if device.type == "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 40_000), (40_000, 48)))
    found = matmul(left.to(device), right.to(device))
    _check(device, "a product of 64 × 40,000 and 40,000 × 48 matrices", found, left.double() @ right.double())
    rows = torch.randn(3, 64, 200, generator=generator)
    wide = rows.double()
    try:
        found = gram_inverse(rows.to(device), 1e-6, 1e-5)[0]
    except NotImplementedError as error:
        raise GlobeError(
            f"device {device}: torch {torch.__version__} has no Cholesky factors there, which the fit needs; "
            "update torch or use --device cpu"
        ) from error
    _check(device, "the inverse of a 64 × 64 matrix", found, torch.linalg.inv(wide @ wide.mT))


def _check(device: torch.device, what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = float((found.cpu().double() - wanted).norm() / wanted.norm())
    if not error < _ROUNDING:
        raise GlobeError(
            f"device {device}: {what} is off by {error:.1e} of its norm, expected rounding (1e-6); update torch or the "
            "system, or use --device cpu"
        )


def device_room(device: torch.device) -> int | None:
    """Bytes that this process may still take of a device's own memory; None where it has none of its own."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def thread_count(threads: int | None) -> int:
    """CPU threads to use: as many as given, or torch's at first and no more than the process has processors.

    Ranks, and jobs that run at a time, share a machine's processors; that torchrun sets OMP_NUM_THREADS to 1 is not
    taken for a wish.
    """
    if threads is not None:
        return threads
    if sharing() > 1:
        return max(1, usable_processors() // sharing())
    return min(_AT_FIRST, usable_processors())


def set_threads(threads: int | None) -> None:
    """Let torch and the kernels use this many CPU threads; None is as for :func:`thread_count`.

    Warns once where torch's threads spin on an oversubscribed machine.
    """
    count = thread_count(threads)
    torch.set_num_threads(count)
    kernels.set_num_threads(count)
    warn_of_spinning()


def keep_memory() -> None:
    """Let the process keep freed memory for the next product, where its C library is glibc, and use pages of 2 MiB.

    Otherwise every intermediate result of some MiB is fresh memory, and its page faults take as long as the product.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_ARENA_MAX, 1)):
        mallopt(option, value)


def find_device(name: str) -> torch.device:
    """The torch device of a name, if this torch and this machine have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a torch device (cpu, cuda, cuda:1, mps)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name}: this torch finds no CUDA device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name}: this torch finds no MPS device")
    return device
