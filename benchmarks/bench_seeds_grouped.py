"""Grouped subspaces and the choice of seeds, on a small synthetic checkpoint: time, memory and error.

Goal: grouped-subspace within 10 times ts-pca, and an error on the experts below that of ts-pca.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from globe import Settings
from globe.choice.choose import choose
from globe.fit.sums import State
from globe.fit.sweep import measure
from globe.seeds import METHODS
from globe.seeds.grouping import balanced_groups

from .synthetic import LIKE, write_synthetic
from .tasks import nothing, seed_task

SETTINGS = Settings(rank=0.75, families=("gate",), device="cpu")


def grouped(task):
    return METHODS["grouped-subspace"](task)


def auto(task):
    return choose(task, METHODS, nothing).seeds


class GroupedSeeds:
    params = (grouped, auto)
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
        method(self.task)

    def peakmem_seeds(self, root, method):
        method(self.task)

    def track_relative_error(self, root, method):
        seeds = method(self.task)
        state = State(seeds.bank, seeds.codes, 1.0)
        return measure(self.task.pool, state, self.task.job, nothing).relative_error

    track_relative_error.unit = "relative error"


class Grouping:
    params = (360, 1440)
    param_names = ("experts",)

    def setup(self, experts):
        rng = np.random.default_rng(0)
        kinds = rng.permutation(experts) // 8
        points = rng.standard_normal((experts // 8, 60))[kinds] + rng.standard_normal((experts, 60))
        self.similarity = points @ points.T

    def time_balanced_groups(self, experts):
        balanced_groups(self.similarity, experts // 8)
