"""Where proxies come from: rows of the checkpoint, or a scratch file of rotated experts, read by blocks of rows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import GramSum, matmul, to_numpy
from globe.compute.stream import ahead, expert_batches
from globe.errors import GlobeError
from globe.seeds.proxies import proxy_blocks, row_spans
from globe.seeds.task import SeedTask

Array = NDArray[np.float64]
Blocks = Iterator[tuple[slice, torch.Tensor]]


@dataclass(frozen=True)
class Proxies:
    """The proxies B_i⁰ (r × d) of all experts of a task, to be read as often as a method needs.

    Parameters
    ----------
    task : SeedTask
    read : callable
        Starts a pass over blocks of rows: the rows in hand, and those rows of all proxies, (N, block · d), in bf16,
        fp16 or fp32.
    """

    task: SeedTask
    read: Callable[[list[slice]], Blocks]

    def blocks(self) -> Blocks:
        """One pass over the blocks of rows that are dealt to this rank, with its progress reported."""
        task = self.task
        spans = row_spans(len(task.family), task.rank, task.family.d, task.job.blocks.proxy_bytes)
        mine = ranks.share(spans)
        for span, block in self.read(mine):
            yield span, block
            task.advance((span.stop - span.start) / task.rank)
        task.advance(1 - sum(span.stop - span.start for span in mine) / task.rank)


def proxies_of(task: SeedTask) -> Proxies:
    """The proxies that `settings.proxies` names."""
    return row_proxies(task) if task.settings.proxies == "rows" else projected_proxies(task)[0]


def row_proxies(task: SeedTask) -> Proxies:
    """B_i⁰ = S W_i, rows of the checkpoint itself (specification, A)."""
    return Proxies(task, partial(proxy_blocks, task.family, task.pool.rows.proxy, task.device))


def projected_proxies(task: SeedTask) -> tuple[Proxies, Array]:
    """B_i⁰ = A_0ᵀ W_i, A_0 the r leading eigenvectors of Σ_i W_i W_iᵀ (specification, B), and ‖B_i⁰‖²; two passes.

    Of the training rows alone: a bank that has seen the rows held out would look best before it is trained.
    """
    summed = GramSum(len(task.pool.rows.train))
    for _, weights in training_rows(task, ranks.dealt(task.family)):
        for matrix in weights:
            summed.add(matrix)
    projector = leading_eigenvectors(ranks.summed_array(summed.matrix), task.rank).to(task.device)
    return stored_proxies(task, lambda weights: matmul(projector, weights))


def leading_eigenvectors(gram: Array, count: int) -> torch.Tensor:
    """The eigenvectors of the `count` largest eigenvalues, as rows, fp32."""
    size = len(gram)
    vectors = scipy.linalg.eigh(gram, subset_by_index=(size - count, size - 1))[1]
    return torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1].T, dtype=np.float32))


def training_rows(task: SeedTask, some: slice | None = None) -> Blocks:
    """One pass over all or some experts without the rows held out, (n, p − held, d) in the checkpoint's dtype.

    As many experts as fit into a block: in the checkpoint's dtype three times, in fp32, and what is made of them.
    """
    family, train = task.family, torch.from_numpy(task.pool.rows.train).to(task.device)
    count = max(1, task.job.blocks.proxy_bytes // (16 * family.p * family.d))
    left = 1.0
    for span, weights in expert_batches(family, count, task.device, some):
        yield span, weights[:, train] if len(train) < family.p else weights
        task.advance(len(weights) / len(family))
        left -= len(weights) / len(family)
    task.advance(left)


def stored_proxies(task: SeedTask, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Proxies, Array]:
    """Proxies `make(W)` (n, r, d) of training rows, written to the scratch folder in one pass, and their ‖B_i⁰‖².

    Blocks of rows lie one after another in the file, so that reading them is sequential. Values are bf16 unless
    the checkpoint is fp32: rounding to 2^-9 does not matter to seeds, and the native Gram takes bf16 as it is.

    Raises
    ------
    GlobeError
        If the scratch folder's disk has no room.
    """
    family = task.family
    count, rank, d = len(family), task.rank, family.d
    dtype = torch.float32 if family.dtype == torch.float32 else torch.bfloat16
    path = task.scratch / f"proxies-{family.name}"
    _check_room(path, count * rank * d * dtype.itemsize)
    spans = row_spans(count, rank, d, task.job.blocks.proxy_bytes)
    energy = np.zeros(count)
    with path.open("wb", buffering=0) as file:
        for experts, weights in training_rows(task):
            made = make(weights.float()).to(dtype).cpu()
            energy[experts] = made.float().pow(2).sum((1, 2)).double().numpy()
            rows = to_numpy(made)
            for span in spans:
                offset = count * span.start + experts.start * (span.stop - span.start)
                _write_at(file.fileno(), np.ascontiguousarray(rows[:, span]), offset * d * dtype.itemsize)

    def read(span: slice) -> torch.Tensor:
        values = count * (span.stop - span.start) * d
        buffer = torch.empty(values, dtype=dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(count * span.start * d * dtype.itemsize)
            view = buffer.view(torch.uint8).numpy().data
            while len(view):
                view = view[file.readinto(view) or _ended(path) :]
        return buffer.view(count, -1)

    def blocks(some: list[slice]) -> Blocks:
        for span, block in zip(some, ahead(partial(read, span) for span in some), strict=True):
            yield span, block.to(task.device)

    return Proxies(task, blocks), energy


def _write_at(file: int, values: NDArray[Any], offset: int) -> None:
    view = values.reshape(-1).view(np.uint8).data
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _ended(path: Path) -> int:
    raise GlobeError(f"{path}: ended early while reading; the file changed during the run")


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise GlobeError(
            f"{path.parent}: {free / 1e9:.2f} GB free, the proxies need {needed / 1e9:.2f} GB of scratch; "
            "free some space or use a method that reads rows of the checkpoint: --method ts-pca"
        )
