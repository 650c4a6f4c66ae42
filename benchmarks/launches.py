"""What the device form asks of a device for a batch of 32 experts: operations, and times that the host reads.

python -m benchmarks.launches [--without-fp64] [--json FILE]

The form of CUDA and MPS runs on the CPU here, and what torch dispatches is counted, by what two more batches add to a
pass: figures of a program, not of a device. An operation is one of torch's that writes values (a factorisation or a
product of a batch is one, though a library may launch several kernels for it); uploads are tensors that come from
NumPy; a read is what makes the host wait: a value taken, or a tensor brought to the host. For the exact dictionary step
a batch is what one step of conjugate gradients does with one.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.synthetic import Shape as Sizes
from benchmarks.synthetic import write_statistics, write_synthetic
from benchmarks.tasks import nothing
from globe.checkpoint.index import Checkpoint
from globe.compute import forms
from globe.compute.blocks import Blocks
from globe.compute.passes import engine
from globe.fit.dictionary import Equations, Solving, mod_exact, unit_atoms
from globe.fit.dictionary_metric import mod_metric
from globe.fit.gauss_newton import Operator
from globe.fit.point import Point, Vector
from globe.fit.problem import Problem
from globe.fit.stored_lefts import Fit, solve_lefts
from globe.fit.sums import State
from globe.fit.sweep import measure, sweep
from globe.runs.job import Job
from globe.runs.stages import Stages
from globe.runs.store import MemoryStore
from globe.seeds.pool import Pool
from globe.seeds.proxies import split_rows
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.calibration import load_calibration
from globe.statistics.metric import build_metric

BATCH, CG_STEPS = 32, 8
RANK, ATOMS = 8, 6
SIZES = Sizes(layers=1, experts=3 * BATCH, p=24, d=32, vocabulary=64, heads=4, shared=32)
_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
_NO_WORK = {"empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh"}


class Counts(TorchDispatchMode):
    """Counts operations, uploads and reads of the thread that it is active on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            self.found["reads"] += 1
        elif not func.is_view and name not in _NO_WORK:
            self.found["operations"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count what this thread does; `cpu` and `from_numpy` are no operations on the CPU, and are counted as calls."""
    here, counts = threading.get_ident(), Counts()

    def noted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if threading.get_ident() == here:
                counts.found[kind] += 1
            return function(*args, **more)

        return call

    reading = mock.patch.object(torch.Tensor, "cpu", noted("reads", torch.Tensor.cpu))
    sending = mock.patch.object(torch, "from_numpy", noted("uploads", torch.from_numpy))
    with reading, sending, counts:
        yield counts.found


@contextmanager
def device_form(without_fp64: bool) -> Iterator[None]:
    """Work on the CPU as on a device."""
    narrow = {"cpu"} if without_fp64 else set()
    with mock.patch.object(forms, "_PER_CORE", set()), mock.patch.object(forms, "_WITHOUT_FP64", narrow):
        yield


def task(root: Path, count: int, weighed: bool) -> tuple[Pool, State, Job]:
    """The first `count` experts of the checkpoint's gate, a random state, and a run."""
    family = Checkpoint(root).family("gate")
    family = replace(family, experts=family.experts[:count])
    settings = Settings(rank=RANK, bank_size=ATOMS, codes="nnls", precision="fp32")
    cpu = torch.device("cpu")
    metric = build_metric(family, load_calibration(root / "statistics"), settings, cpu) if weighed else None
    rows = split_rows(family.p, RANK, np.zeros(family.p), settings)
    bank = torch.randn(ATOMS, RANK, family.d, generator=torch.Generator().manual_seed(0))
    codes = np.random.default_rng(0).uniform(0.1, 1, (count, ATOMS))
    state = State(*unit_atoms(bank, codes), 1.0)
    job = Job(settings, cpu, Blocks(experts=BATCH), Stages(), MemoryStore())
    return Pool(family, Shape(RANK, ATOMS, 0), rows, metric), state, job


def _exact_step(pool: Pool, state: State, job: Job) -> Callable[[], Any]:
    _, sums = sweep(pool, state, job, nothing)
    assert sums.left_grams is not None
    equations = Equations(sums.codes, sums.left_grams, sums.right_side)
    how = Solving(1e-3, CG_STEPS)
    if pool.metric is None:
        return lambda: mod_exact(equations, state.bank, how, job.blocks)
    metric = pool.metric
    return lambda: mod_metric(equations, state.bank, metric, how, job.blocks)


def _looked(pool: Pool, state: State, job: Job) -> Problem:
    problem = Problem(pool.all_trained(), tuple(state.bank.shape), job, Path())  # all is kept in memory
    problem.look(state.bank, state.codes, 0, nothing)
    return problem


def _evaluation(pool: Pool, state: State, job: Job) -> Callable[[], Any]:
    problem = _looked(pool, state, job)
    return lambda: problem.look(state.bank, state.codes, 0, nothing)


def _product(pool: Pool, state: State, job: Job) -> Callable[[], Any]:
    problem, point = _looked(pool, state, job), Point(state.bank, state.codes, False)
    vector = Vector(torch.ones_like(state.bank), np.ones_like(state.codes))

    def multiply() -> None:
        with engine(job.device) as workers:
            Operator(problem, point, 1.0, workers)(vector)

    return multiply


def _lefts(pool: Pool, state: State, job: Job) -> Callable[[], Any]:
    order = [("gate", number) for number in range(len(pool.family))]
    fits = {"gate": Fit(pool.family, state, pool.metric)}
    return lambda: list(solve_lefts(fits, order, job.settings, job.blocks))


STAGES: dict[str, Callable[[Pool, State, Job], Callable[[], Any]]] = {
    "measure": lambda pool, state, job: lambda: measure(pool, state, job, nothing),
    "loop pass": lambda pool, state, job: lambda: sweep(pool, state, job, nothing),
    "exact step": _exact_step,
    "joint evaluation": _evaluation,
    "joint product": _product,
    "left factors": _lefts,
}


def per_batch(stage: str, root: Path, weighed: bool) -> dict[str, float]:
    """What a batch adds to a stage."""
    found = []
    for count in (BATCH, 3 * BATCH):
        run = STAGES[stage](*task(root, count, weighed))
        with counted() as counts:
            run()
        found.append(counts)
    batches = 2.0
    if stage == "exact step":  # weights only, its batches are of 64: 96 experts are one more than 32
        batches = CG_STEPS * (2.0 if weighed else 1.0)
    return {kind: (found[1][kind] - found[0][kind]) / batches for kind in ("operations", "uploads", "reads")}


@click.command()
@click.option("--without-fp64", is_flag=True, help="As on MPS.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(without_fp64: bool, json_file: Path | None) -> None:
    """Print operations, uploads and reads of a batch for every stage, weights only and in a metric."""
    table = {}
    with tempfile.TemporaryDirectory() as folder, device_form(without_fp64):
        root = Path(folder) / "model"
        write_synthetic(root, SIZES)
        write_statistics(root, root / "statistics", SIZES)
        for stage in STAGES:
            for weighed in (False, True):
                name = f"{stage}, {'in the metric' if weighed else 'weights only'}"
                table[name] = per_batch(stage, root, weighed)
                line = ", ".join(f"{value:g} {kind}" for kind, value in table[name].items())
                print(f"{name}: {line}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
