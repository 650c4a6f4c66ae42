"""Jobs dealt to devices: a process for each, as many at a time as there are places."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from globe.errors import UsageError
from globe.machine.launch import SHARING

Job = TypeVar("Job")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where a job runs: a torch device, and how many jobs at a time share the machine."""

    device: str
    together: int

    @property
    def kind(self) -> str:
        """The value of `device` among the settings that means it."""
        return self.device.partition(":")[0]

    def environment(self) -> dict[str, str]:
        """The environment of a process that sees this device alone, and takes its share of processors and memory."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        mine = self.device.partition(":")[2] or "0" if self.kind == "cuda" else ""
        if mine and seen:
            mine = seen.split(",")[int(mine)].strip()
        return {**os.environ, "CUDA_VISIBLE_DEVICES": mine, SHARING: str(self.together)}


def places(devices: str, jobs_per_device: int) -> list[Place]:
    """The places of a list such as "cuda:0,cuda:1".

    Raises
    ------
    UsageError
        If a device is none or not there, is named twice, or is to hold no job.
    """
    named = [name.strip() for name in devices.split(",")]
    if jobs_per_device < 1:
        raise UsageError(f"jobs_per_device is {jobs_per_device}; expected 1 or more")
    there = {"cpu"} | ({"mps"} if torch.backends.mps.is_available() else set())
    there |= {f"cuda:{number}" for number in range(torch.cuda.device_count())}
    for name in named:
        if name not in there:
            raise UsageError(f"devices: {name!r} is not here; expected some of {', '.join(sorted(there))}")
    if len(set(named)) < len(named):
        raise UsageError(f"devices is {devices!r}; expected each once: use jobs_per_device for several jobs on one")
    return [Place(name, len(named) * jobs_per_device) for name in named for _ in range(jobs_per_device)]


def deal(jobs: Sequence[Job], where: Sequence[Place], work: Callable[[int, Job, Place], Value]) -> list[Value]:
    """`work` of every job's number, the job and its place, in the order of the jobs, each at a free place."""
    free: queue.SimpleQueue[Place] = queue.SimpleQueue()
    for place in where:
        free.put(place)

    def one(numbered: tuple[int, Job]) -> Value:
        place = free.get()
        try:
            return work(*numbered, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(where), "globe-job") as workers:
        return list(workers.map(one, enumerate(jobs, 1)))
