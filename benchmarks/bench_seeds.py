"""Seeding methods on a small synthetic checkpoint: time, memory and the error of what they start from."""

import shutil
import tempfile
from pathlib import Path

import torch

from globe import Settings
from globe.fit.sums import State
from globe.fit.sweep import measure
from globe.seeds import METHODS

from .synthetic import LIKE, write_synthetic
from .tasks import nothing, seed_task

SETTINGS = Settings(rank=0.5, device="cpu")


class Seeds:
    params = tuple(METHODS)
    param_names = ("method",)

    def setup_cache(self):
        root = Path("model").absolute()
        write_synthetic(root, LIKE["tiny"])
        return root

    def setup(self, root, method):
        torch.set_num_threads(1)
        self.scratch = Path(tempfile.mkdtemp())
        self.task = seed_task(root, SETTINGS, 8, self.scratch)

    def teardown(self, root, method):
        shutil.rmtree(self.scratch)

    def time_seeds(self, root, method):
        METHODS[method](self.task)

    def peakmem_seeds(self, root, method):
        METHODS[method](self.task)

    def track_explained_variance(self, root, method):
        return METHODS[method](self.task).explained_variance

    def track_relative_error(self, root, method):
        seeds = METHODS[method](self.task)
        state = State(seeds.bank, seeds.codes, 1.0)
        return measure(self.task.pool, state, self.task.job, nothing).relative_error

    track_explained_variance.unit = "share of the energy"
    track_relative_error.unit = "relative error"
