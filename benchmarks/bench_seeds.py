"""Seeding methods on a small synthetic checkpoint: time, memory and the error of what they start from."""

import shutil
import tempfile
from pathlib import Path

import torch

from globe import Settings
from globe.checkpoint.index import Checkpoint
from globe.fit.sweep import State, measure
from globe.seeds import METHODS, SeedTask
from globe.seeds.proxies import scan, split_rows

from .synthetic import LIKE, write_synthetic

SETTINGS = Settings(rank=0.5, device="cpu")


def nothing(steps=1):
    pass


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
        self.family = Checkpoint(root).family("gate")
        rank = SETTINGS.resolve_rank(self.family.p, self.family.d)
        self.rows = split_rows(self.family.p, rank, scan(self.family, SETTINGS, nothing).row_energy, SETTINGS)
        cpu = torch.device("cpu")
        self.task = SeedTask(self.family, self.rows, 8, SETTINGS, cpu, 1 << 20, self.scratch, nothing, nothing)

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
        return measure(self.family, self.rows, state, SETTINGS, nothing).relative_error

    track_explained_variance.unit = "share of the energy"
    track_relative_error.unit = "relative error"
