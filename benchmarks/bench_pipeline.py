"""Stages of a compression, on a small synthetic checkpoint: time, memory and error of each."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from globe import Settings, compress, export
from globe.checkpoint.index import Checkpoint
from globe.compute.codes import initial_codes
from globe.compute.gemm import bank_gram
from globe.fit.lefts import fit_lefts
from globe.fit.sums import State
from globe.fit.sweep import measure, sweep
from globe.runs.store import RunStore
from globe.seeds import METHODS
from globe.seeds.proxies import scan

from .synthetic import LIKE, write_synthetic
from .tasks import nothing, seed_task

WEIGHTS_ONLY = {"solver": "alternate", "calibrate": "none"}
SETTINGS = Settings(rank=0.75, outer_loops=2, families=("gate",), device="cpu", **WEIGHTS_ONLY)


class Stages:
    def setup_cache(self):
        root = Path("model").absolute()
        write_synthetic(root, LIKE["tiny"])
        compress(root, Path("out").absolute(), SETTINGS)
        return root

    def setup(self, root):
        torch.set_num_threads(1)
        self.target = Path(tempfile.mkdtemp()) / "out"
        self.task = seed_task(root, SETTINGS, 8, self.target.parent)
        self.family = self.task.family
        self.seeds = METHODS["ts-pca"](self.task)
        self.gram = bank_gram(self.seeds.bank)
        self.correlations = self.seeds.codes @ self.gram
        self.state = State(self.seeds.bank, self.seeds.codes, 1.0)

    def teardown(self, root):
        shutil.rmtree(self.target.parent)

    def time_index(self, root):
        Checkpoint(root).family("gate")

    def time_scan(self, root):
        scan(self.family, SETTINGS, nothing)

    def time_seeds(self, root):
        METHODS["ts-pca"](self.task)

    def time_codes(self, root):
        initial_codes(self.gram, self.correlations, "nnls")

    def time_left_factors(self, root):
        weights = torch.stack([self.family.read(0).float()])
        fit_lefts(weights, torch.randn(1, self.task.rank, self.family.d), SETTINGS)

    def time_measure(self, root):
        measure(self.task.pool, self.state, self.task.job, nothing)

    def time_loop(self, root):
        sweep(self.task.pool, self.state, self.task.job, nothing)

    def time_compress(self, root):
        compress(root, self.target, SETTINGS, overwrite=True)

    def peakmem_compress(self, root):
        compress(root, self.target, SETTINGS)

    def track_relative_error(self, root):
        return float(np.float64(compress(root, self.target, SETTINGS).metrics["families"]["gate"]["relative_error"]))

    track_relative_error.unit = "relative error"

    def time_export(self, root):
        export(root.parent / "out", self.target, overwrite=True)

    def peakmem_export(self, root):
        export(root.parent / "out", self.target)


class Results:
    """A bank of 64 MiB to disk, synced and checksummed, and back."""

    def setup(self):
        self.folder = Path(tempfile.mkdtemp())
        self.store = RunStore(self.folder / "run", {}, {}, nothing)
        self.bank = torch.randn(16, 1024, 1024)
        self.store.save("saved", {"bank": self.bank}, {})

    def teardown(self):
        shutil.rmtree(self.folder)

    def time_save(self):
        self.store.save("again", {"bank": self.bank}, {})

    def time_check(self):
        self.store.check("saved")

    def time_load(self):
        self.store.load("saved")
