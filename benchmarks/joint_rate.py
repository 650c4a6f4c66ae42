"""How fast the joint fit multiplies, against torch.mm in the same process, one thread to an expert.

python -m benchmarks.joint_rate [--size smollm2|qwen] [--experts 32] [--threads 2] [--json FILE]

Random experts of 384 × 576 (rank 288, 30 atoms) or 1,408 × 2,048 (rank 704, 180 atoms) in a random metric; speed does
not depend on the numbers. What is multiplied in a pass and in a product with the Gauss-Newton matrix is counted by
torch's own counter as it is done, fp64 like fp32; mixtures, sums over experts and triangular solves, which it does not
see, are time without products. The peer is torch.mm of fp32 1,408 × 2,048 by 2,048 × 704, one on each thread. Medians
of five.
"""

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic import Shape as Sizes
from benchmarks.synthetic import write_statistics, write_synthetic
from benchmarks.tasks import nothing
from globe.checkpoint.index import Checkpoint
from globe.compute.blocks import BLOCKS
from globe.compute.devices import keep_memory, set_threads
from globe.compute.passes import engine
from globe.fit import problem as problem_module
from globe.fit.gauss_newton import Operator
from globe.fit.point import Point, Vector
from globe.fit.problem import Problem
from globe.runs.job import Job
from globe.runs.stages import Stages
from globe.runs.store import MemoryStore
from globe.seeds.pool import Pool
from globe.seeds.proxies import Rows
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.calibration import load_calibration
from globe.statistics.metric import build_metric

SIZES = {"smollm2": (384, 576, 288, 30), "qwen": (1408, 2048, 704, 180)}
TIMES = 5


def seconds(work):
    """The median time of `work`."""
    work()
    found = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def peer_rate(threads):
    """FLOP/s of torch.mm, one product on each thread."""
    pairs = [(torch.randn(1408, 2048), torch.randn(2048, 704)) for _ in range(threads)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        spent = seconds(lambda: list(pool.map(lambda pair: [torch.mm(*pair) for _ in range(4)], pairs)))
    torch.set_num_threads(threads)
    return 4 * threads * 2 * 1408 * 2048 * 704 / spent


class Serial:
    """The engine of a CPU on one thread, where torch's counter sees what is multiplied."""

    def map(self, work, count):
        for k in range(count):
            yield slice(k, k + 1), work(slice(k, k + 1))

    def run(self, work, count):
        for _ in self.map(work, count):
            pass


@contextmanager
def serial(device):
    yield Serial()


def products(work):
    """FLOP of the products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@click.command()
@click.option("--size", type=click.Choice(sorted(SIZES)), default="smollm2", show_default=True)
@click.option("--experts", default=32, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(size, experts, threads, json_file):
    set_threads(threads)
    keep_memory()
    p, d, rank, atoms = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "model"
        sizes = Sizes(2, experts // 2, p, d, 64, 4, p)
        write_synthetic(root, sizes)
        write_statistics(root, root / "statistics", sizes)
        family, settings, cpu = Checkpoint(root).family("gate"), Settings(), torch.device("cpu")
        metric = build_metric(family, load_calibration(root / "statistics"), settings, cpu)
        everything = np.arange(p)
        pool = Pool(family, Shape(rank, atoms, 0), Rows(everything, everything[:0], everything), metric)
        bank = torch.randn(atoms, rank, d) / d**0.5
        random = np.random.default_rng(0)
        codes = random.random((experts, atoms)) * (random.random((experts, atoms)).argsort(1) < 12)
        problem = Problem(pool, (atoms, rank, d), Job(settings, cpu, BLOCKS, Stages(), MemoryStore()), Path(folder))
        peer = peer_rate(threads)
        spent = {"pass": seconds(lambda: problem.look(bank, codes, 0, nothing))}
        with mock.patch.object(problem_module, "engine", serial):
            counts = {"pass": products(lambda: problem.look(bank, codes, 0, nothing))}
        value, vector = problem.look(bank, codes, 0, nothing), Vector(torch.randn_like(bank), codes)
        with engine(cpu) as workers:
            operator = Operator(problem, Point(bank, codes, False), value.scale, workers)
            spent["iteration"] = seconds(lambda: operator(vector))
        counts["iteration"] = products(lambda: Operator(problem, Point(bank, codes, False), 1.0, Serial())(vector))
    rows = {"torch.mm GFLOP/s": peer / 1e9}
    for name, count in counts.items():
        rate = count / spent[name]
        rows[f"{name}, ms an expert"] = 1e3 * spent[name] / experts
        rows[f"{name}, GFLOP an expert"] = count / experts / 1e9
        rows[f"{name}, of torch.mm's rate"] = rate / peer
    for name, value in rows.items():
        print(f"{name}: {value:.3g}")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
