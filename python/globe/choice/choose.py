"""Which seeds to start from (specification, L): a few methods in turn, the best by its error on the experts kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from globe.checkpoint.tensorfile import TensorWriter, read_header, read_tensor
from globe.errors import GlobeError
from globe.fit.sums import State
from globe.fit.sweep import measure
from globe.seeds import Seeds, SeedTask
from globe.sizes.ratios import Shape
from globe.sizes.work import Task, seeds_work

SAMPLE = 64
ENOUGH = 0.1
ORDER = ("ts-pca", "left-gram", "grouped-subspace", "rpca", "residual-greedy")
_FLOPS_PER_BYTE = 100.0  # of a core's fp32 product, while a byte comes from the disk

Method = Callable[[SeedTask], Seeds]


@dataclass(frozen=True)
class Try:
    """A method that was tried: what it said of its seeds, and their relative error on the sampled experts.

    `error` says why there are no seeds.
    """

    method: str
    seconds: float
    explained_variance: float | None = None
    proxy_error: float | None = None
    relative_error: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Choice:
    """The seeds that were kept, and what was tried, passed over (method: reason), kept and why."""

    seeds: Seeds
    tries: list[Try]
    skipped: dict[str, str]
    chosen: str
    why: str

    def as_dict(self) -> dict[str, Any]:
        """All but the seeds, as plain values."""
        tries = [asdict(tried) for tried in self.tries]
        return {"tries": tries, "skipped": self.skipped, "chosen": self.chosen, "why": self.why}


def choose(task: SeedTask, methods: Mapping[str, Method], advance: Callable[[float], None]) -> Choice:
    """Try seeds in the order of ORDER, as the numbers say and `seed_budget` allows, and keep the best.

    An error is that of up to SAMPLE evenly spaced experts with left factors refitted. ts-pca is tried first; where its
    error is above ENOUGH the next ones follow until one is not. A method is passed over if

    - its modelled cost (`cost`; never the clock, so that a repeated run chooses the same) exceeds what is left;
    - it is rpca, and left-gram, whose proxies are the same, was not the best so far;
    - it is residual-greedy, grouped-subspace is the best so far, and the proxies of ts-pca have less than half of their
      energy in its span: then no bank of proxies comes near.

    Parameters
    ----------
    task : SeedTask
    methods : mapping
        By name; those that ORDER does not name are not tried.
    advance : callable
        Called with 1 for every method of ORDER, tried or not.

    Raises
    ------
    GlobeError
        If no method gives seeds; the first one's error.
    """
    file = task.scratch / f"best-{task.family.name}.safetensors"
    left = task.settings.seed_budget * cost("ts-pca", task)
    tries: list[Try] = []
    skipped: dict[str, str] = {}
    failures: list[GlobeError] = []
    best: Try | None = None
    for name in ORDER:
        reason = _reason_against(name, methods, tries, cost(name, task), left)
        if reason is None:
            left -= cost(name, task)
            try:
                tried, seeds = _try(name, methods[name], task)
            except GlobeError as error:
                failures.append(error)
                tried = Try(name, 0.0, error=str(error))
            else:
                if best is None or _error(tried) < _error(best):
                    best, kept = tried, replace(seeds, bank=torch.empty(0))
                    with TensorWriter(file, {"bank": ("F32", tuple(seeds.bank.shape))}) as writer:
                        writer.write("bank", seeds.bank)  # one bank in memory while the next is made
                del seeds
            tries.append(tried)
            task.job.log(f"{task.family.name}: auto: {_line(tried)}")
        else:
            skipped[name] = reason
            if name in methods:
                task.job.log(f"{task.family.name}: auto: {name} passed over: {reason}")
        advance(1)
    if best is None:
        raise failures[0] if failures else GlobeError(f"none of {', '.join(ORDER)} is there to try")
    why = _why(best, tries)
    task.job.log(f"{task.family.name}: auto: {best.method} chosen: {why}")
    bank = read_tensor(read_header(file).tensors["bank"]).to(task.device)
    file.unlink()
    return Choice(replace(kept, bank=bank), tries, skipped, best.method, why)


def cost(method: str, task: SeedTask) -> float:
    """Operations of a method, reading counted as operations too; a rough model of the sizes alone.

    A method that it does not know costs what left-gram does.
    """
    work = seeds_work(method, Task(task.family, Shape(task.rank, task.size, 0), task.settings, sparse=True))
    return work.flops + _FLOPS_PER_BYTE * work.read


def _reason_against(
    name: str, methods: Mapping[str, Method], tries: list[Try], needed: float, left: float
) -> str | None:
    if name not in methods:
        return "not available"
    best = min((tried for tried in tries if tried.error is None), key=_error, default=None)
    if best is None:
        return None
    if _error(best) <= ENOUGH:
        return f"the error of {best.method}, {_error(best):.4f}, is low enough ({ENOUGH})"
    if needed > left:
        return f"would cost {needed / max(left, 1.0):.1f} times what is left of seed_budget"
    before = {tried.method: tried for tried in tries if tried.error is None}
    if name == "rpca" and "left-gram" in before and best.method != "left-gram":
        return f"its proxies are those of left-gram, which {best.method} beats"
    if name == "residual-greedy" and best.method == "grouped-subspace" and "ts-pca" in before:
        explained = before["ts-pca"].explained_variance or 0.0
        if explained < 0.5:
            return f"the atoms of ts-pca explain {explained:.0%} of the proxies: proxies have too little in common"
    return None


def _try(name: str, method: Method, task: SeedTask) -> tuple[Try, Seeds]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=task.scratch) as folder:
        seeds = method(replace(task, scratch=Path(folder)))
    count = len(task.family)
    sample = np.unique(np.arange(min(SAMPLE, count)) * count // min(SAMPLE, count))
    some = replace(task.family, experts=tuple(task.family.experts[number] for number in sample))
    state = State(seeds.bank, seeds.codes[sample], 1.0)
    sampled = replace(task.pool, family=some, metric=None)
    error = measure(sampled, state, task.job, lambda steps: None).relative_error
    seconds = time.perf_counter() - started
    return Try(name, seconds, seeds.explained_variance, seeds.proxy_error, error), seeds


def _error(tried: Try) -> float:
    return float("inf") if tried.relative_error is None else tried.relative_error


def _line(tried: Try) -> str:
    if tried.error is not None:
        return f"{tried.method} failed: {tried.error}"
    return (
        f"{tried.method}: error {_error(tried):.4f} on the experts, {tried.proxy_error:.4f} on its targets, explained "
        f"variance {tried.explained_variance:.3f}, {tried.seconds:.1f} s"
    )


def _why(best: Try, tries: list[Try]) -> str:
    others = [f"{tried.method} {_error(tried):.4f}" for tried in tries if tried is not best and tried.error is None]
    said = f"relative error {_error(best):.4f} on the sampled experts"
    if others:
        return f"{said}, the lowest (" + ", ".join(others) + ")"
    return f"{said}, low enough" if _error(best) <= ENOUGH else f"{said}; no other method gave seeds"
