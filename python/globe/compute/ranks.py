"""The third form of the engine for passes: processes of torch.distributed, each with experts of its own.

Every rank goes through the same stages. A pass goes over the experts that are dealt to the rank, and what it sums is
summed over the ranks; everything else is done alike by all. Without a process group there is one rank, all experts are
its own, and sums are as they are, so no stage asks how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from globe.checkpoint.family import Family
from globe.errors import GlobeError, UsageError
from globe.machine.launch import launched_rank, launched_ranks, launched_restarts, local_rank

Value = TypeVar("Value")
_SHOWN = 60.0  # seconds
_PATIENCE = timedelta(days=7)  # a slow rank is waited for; one that has ended closes its connections, which is noticed


class _Traffic:
    """Bytes that this rank has sent, and whether it works on its own for now."""

    sent = 0
    alone = False


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun has started, if it has: gloo for what lies on the CPU, nccl for CUDA.

    Raises
    ------
    GlobeError
        If the others cannot be reached.
    """
    if launched_ranks() == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    try:
        store, number, count = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun's own restarts (`--max-restarts`) meet in the same store, where the addresses of before still stand.
        store = PrefixStore(f"restart {launched_restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        told = str(error).strip().partition("\n")[0]
        raise GlobeError(f"rank {launched_rank()} cannot reach the others ({told}); start all with torchrun") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_loss(error: Exception) -> bool:
    """Whether an error says that another rank has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def size() -> int:
    """The number of ranks: 1 without torchrun, and while this one works `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _Traffic.alone else 1


def rank() -> int:
    """This process's number among the ranks; 0 speaks for all."""
    return dist.get_rank() if dist.is_initialized() else 0


def sent() -> int:
    """Bytes that a rank has sent so far, the mean over the ranks, by the volume of what was exchanged.

    A sum of n bytes over K ranks is 2 n (K − 1) / K (reduce-scatter and all-gather), what one gives to all
    n (K − 1) / K.
    """
    return _Traffic.sent


@contextmanager
def alone() -> Iterator[None]:
    """Work that this rank does without the others, as if there were none."""
    before, _Traffic.alone = _Traffic.alone, True
    try:
        yield
    finally:
        _Traffic.alone = before


def dealt(family: Family) -> slice:
    """The experts of this rank: whole layers as far as there are enough, about as many for every rank.

    Matrices of a family are of one shape, so as many experts are as many bytes.
    """
    cuts = _cuts(family, size())
    here = rank() if size() > 1 else 0
    return slice(cuts[here], cuts[here + 1])


def most_dealt(family: Family) -> int:
    """The most experts of a family that a rank has."""
    return int(np.diff(_cuts(family, size())).max())


def _cuts(family: Family, parts: int) -> list[int]:
    """Where the experts of one rank end and those of the next begin."""
    count = len(family)
    if parts == 1:
        return [0, count]
    runs = [len(list(run)) for _, run in groupby(family.experts, lambda expert: expert.layer)]
    ends = np.cumsum(runs) if len(runs) >= parts else np.arange(1, count + 1)
    inner = [int(ends[int(np.abs(ends - number * count / parts).argmin())]) for number in range(1, parts)]
    return [0, *inner, count]


def share(items: Sequence[Value]) -> list[Value]:
    """Every K-th of the items, beginning with that of the rank's number."""
    return list(items[rank() % size() :: size()])


def own(items: Sequence[Value]) -> Iterator[Value]:
    """This rank's share of the items; it works `alone` on each until it asks for the next."""
    with_me = share(items)
    before, _Traffic.alone = _Traffic.alone, True
    try:
        yield from with_me
    finally:
        _Traffic.alone = before


def summed(total: torch.Tensor) -> torch.Tensor:
    """Σ over the ranks of a tensor, in place; the order of the summands is that of a ring, the same in every run."""
    if size() == 1 or total.numel() == 0:
        return total
    there = total if total.device.type in ("cpu", "cuda") else total.cpu()
    there = there if there.is_contiguous() else there.contiguous()
    dist.all_reduce(there)
    _count(2 * there.nbytes)
    return total if there is total else total.copy_(there)


def summed_array(total: NDArray[Any]) -> NDArray[Any]:
    """Σ over the ranks of an array; a new one where there are several."""
    if size() == 1:
        return total
    flat = torch.from_numpy(np.ascontiguousarray(total).reshape(-1).copy())
    return summed(flat).numpy().reshape(total.shape)


def added(value: float) -> float:
    """Σ over the ranks of a number, the same at all of them."""
    return float(summed_array(np.array([value]))[0])


def atoms(count: int) -> slice:
    """Which of so many atoms are this rank's, where what is done for each is dealt."""
    return _shares(count)[rank() if size() > 1 else 0]


def _shares(count: int) -> list[slice]:
    """So many atoms, or columns, dealt to the ranks."""
    return [slice(count * number // size(), count * (number + 1) // size()) for number in range(size())]


def _length(share: slice) -> int:
    return int(share.stop - share.start)


def scattered(total: torch.Tensor) -> torch.Tensor:
    """Σ over the ranks of this rank's atoms of (m, …), in the order of the ranks; `total` itself where there is one."""
    if size() == 1:
        return total
    parts, mine = [total[share].numel() for share in _shares(len(total))], total[atoms(len(total))]
    found = _exchanged(total.reshape(-1), parts, [mine.numel()] * size()).view(size(), *mine.shape)
    _count(total.nbytes)
    result = found[0].clone()
    for part in found[1:]:
        result += part
    return result


def assembled(own: torch.Tensor, count: int) -> torch.Tensor:
    """All atoms (m, …) of every rank's own; `own` itself where there is one rank."""
    if size() == 1:
        return own
    place = own.device if own.device.type != "mps" else torch.device("cpu")
    whole = torch.empty(count, *own.shape[1:], dtype=own.dtype, device=place)
    whole[atoms(count)] = own.to(place)
    for number, share in enumerate(_shares(count)):
        part = whole[share]
        if part.numel():
            dist.broadcast(part.view(torch.uint8), number)
    _count(whole.nbytes)
    return whole.to(own.device)


def by_columns(own: torch.Tensor, count: int) -> torch.Tensor:
    """This rank's share of the columns of all atoms (m, c), made of every rank's own; all where there is one rank."""
    flat = own.flatten(1)
    if size() == 1:
        return flat
    shares = _shares(flat.shape[1])
    mine = _length(shares[rank()])
    sent = torch.cat([flat[:, share].reshape(-1) for share in shares])
    lengths = [_length(share) * mine for share in _shares(count)]
    found = _exchanged(sent, [len(flat) * _length(share) for share in shares], lengths)
    _count(found.nbytes)
    return found.view(count, mine)


def by_atoms(columns: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`by_columns`: this rank's atoms, in the shape of those that it gave."""
    if size() == 1:
        return columns.view_as(own)
    widths = [_length(share) for share in _shares(math.prod(own.shape[1:]))]
    parts, lengths = [columns[share].numel() for share in _shares(len(columns))], [len(own) * wide for wide in widths]
    found = _exchanged(columns.reshape(-1), parts, lengths).split(lengths)
    _count(columns.nbytes)
    return torch.cat([part.view(len(own), wide) for part, wide in zip(found, widths, strict=True)], 1).view_as(own)


def _exchanged(sent: torch.Tensor, parts: list[int], lengths: list[int]) -> torch.Tensor:
    """What all ranks have sent to this one, one after the other: so many numbers of each, and `parts` to each."""
    there = sent.cpu() if sent.device.type == "mps" else sent
    found = torch.empty(sum(lengths), dtype=there.dtype, device=there.device)
    dist.all_to_all_single(found, there, lengths, parts)
    return found.to(sent.device)


def agreed(value: Value) -> Value:
    """Rank 0's value, which all go on with: what follows from clocks and rounding may differ between machines."""
    if size() == 1:
        return value
    if isinstance(value, float):
        held = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(held, 0)
        _count(8)
        return float(held)  # type: ignore[return-value]
    told = [value if rank() == 0 else None]
    dist.broadcast_object_list(told, 0)
    return told[0]  # type: ignore[return-value]


def given(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, in place."""
    if size() > 1 and tensor.numel():
        dist.broadcast(tensor, 0)
        _count(tensor.nbytes)
    return tensor


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks; all have come so far."""
    if size() == 1:
        return [value]
    told: list[Any] = [None] * size()
    dist.all_gather_object(told, value)
    return told


def clock() -> float:
    """Rank 0's seconds, by which all decide."""
    return agreed(perf_counter())


@contextmanager
def together() -> Iterator[None]:
    """Work that any rank may refuse: if one does, all raise its error, named by its rank unless all have the same.

    There must be no exchange with other ranks within.
    """
    if size() == 1:
        yield
        return
    mine: GlobeError | OSError | None = None
    try:
        yield
    except (GlobeError, OSError) as error:
        mine = error
    errors = gathered(mine)
    first = next((number for number, error in enumerate(errors) if error is not None), None)
    if first is None:
        return
    found = errors[first]
    if all(str(error) == str(found) for error in errors):
        raise found  # type: ignore[misc]
    kind = UsageError if isinstance(found, UsageError) else GlobeError
    raise kind(f"rank {first}: {found}")


def lead(work: Callable[[], Value]) -> Value:
    """What rank 0 makes of some work, which it does alone while the others wait; its refusals are those of all."""
    if size() == 1:
        return work()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            with alone():
                told[0] = work()
        except (GlobeError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    result: Value = told[0]
    return result


def seen(path: Path) -> bool:
    """Whether this rank sees what rank 0 has made; a directory that machines share may show it some time later."""
    ends = perf_counter() + _SHOWN
    while not path.exists():
        if size() == 1 or perf_counter() > ends:
            return False
        sleep(0.5)
    return True


def _count(volume: int) -> None:
    _Traffic.sent += volume * (size() - 1) // size()
