"""The gate of a checkpoint as a task for seeding methods, with all that loops need too."""

from pathlib import Path

import torch

from globe.checkpoint.index import Checkpoint
from globe.compute.blocks import BLOCKS
from globe.runs.job import Job
from globe.runs.stages import Stages
from globe.runs.store import MemoryStore
from globe.seeds import SeedTask
from globe.seeds.pool import pool_of
from globe.seeds.proxies import scan
from globe.settings import Settings
from globe.sizes.ratios import Shape


def nothing(steps=1):
    """Report no progress."""


def seed_task(root: Path, settings: Settings, size: int, scratch: Path) -> SeedTask:
    """Index and scan the gate, and ask for `size` atoms."""
    family = Checkpoint(root).family("gate")
    shape = Shape(settings.resolve_rank(family.p, family.d), size, len(family) * size)
    pool = pool_of(family, shape, scan(family, settings, nothing), settings)
    job = Job(settings, torch.device("cpu"), BLOCKS, Stages(), MemoryStore())
    return SeedTask(pool, size, job, scratch, nothing)
