"""The joint fit's error against passes over the experts and against processor seconds.

python -m benchmarks.joint_curves MODEL [--calibration FILE] [--family gate] [--method grouped-subspace] [--rank 288]
                                  [--bank-size 30] [--steps 14] [--iterations 8] [--threads 2] [--json FILE]

A pass is one evaluation: every expert is touched once. Conjugate gradients touch what the pass kept, not the experts;
their time is in the processor seconds. Seeds are not counted. Without a calibration the weights alone are fitted.
"""

import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.tasks import nothing
from globe.checkpoint.index import Checkpoint
from globe.compute.blocks import BLOCKS
from globe.compute.devices import keep_memory, set_threads
from globe.fit.joint import fit_joint
from globe.fit.problem import Problem
from globe.fit.sums import State
from globe.runs.job import Job
from globe.runs.stages import Silent, Stages
from globe.runs.store import MemoryStore
from globe.seeds import METHODS, SeedTask
from globe.seeds.pool import pool_of
from globe.seeds.proxies import scan
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.calibration import load_calibration
from globe.statistics.metric import build_metric


class Clock(Silent):
    """Prints what is logged, with the processor seconds so far."""

    def __init__(self):
        self.start = time.process_time()
        self.seconds = []

    def log(self, line):
        self.seconds.append(time.process_time() - self.start)
        print(f"{self.seconds[-1]:8.1f} s  {line}", flush=True)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calibration", type=click.Path(path_type=Path))
@click.option("--family", default="gate", show_default=True)
@click.option("--method", default="grouped-subspace", show_default=True)
@click.option("--rank", default=288, show_default=True)
@click.option("--bank-size", default=30, show_default=True)
@click.option("--steps", type=int, help="At most.  [default: that of globe compress]")
@click.option("--iterations", type=int, help="Of conjugate gradients, a step.  [default: that of globe compress]")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(model, calibration, family, method, rank, bank_size, steps, iterations, threads, json_file):
    set_threads(threads)
    keep_memory()
    asked = {"joint_steps": steps, "cg_steps": iterations}
    settings = replace(Settings(rank=rank), **{name: count for name, count in asked.items() if count is not None})
    experts = Checkpoint(model).family(family)
    metric = None
    if calibration is not None:
        metric = build_metric(experts, load_calibration(calibration), settings, torch.device("cpu"))
    shape = Shape(rank, bank_size, len(experts) * bank_size)
    pool = pool_of(experts, shape, scan(experts, settings, nothing), settings, metric)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(settings, torch.device("cpu"), BLOCKS, Stages(), MemoryStore())
        seeds = METHODS[method](SeedTask(pool, bank_size, job, Path(folder), nothing))
        clock = Clock()
        job = replace(job, stages=Stages(clock))
        with job.stages.stage("joint", 1):
            problem = Problem(pool.all_trained(), tuple(seeds.bank.shape), job, Path(folder))
            _, found = fit_joint(problem, State(seeds.bank, seeds.codes, 1.0), job, nothing)
    rows = [
        {"passes": line.evaluations, "iterations": line.iterations, "seconds": seconds, "error": line.error}
        for line, seconds in zip(found.history, clock.seconds, strict=False)
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{found.evaluations} passes, {found.iterations} iterations, {found.stopped}; peak {peak:.2f} GiB")
    if json_file is not None:
        told = {"family": family, "method": method, "metric": calibration is not None, "threads": threads}
        json_file.write_text(json.dumps({**told, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
