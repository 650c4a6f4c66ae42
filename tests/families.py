"""Expert families made to order: written as a checkpoint and read back through the package's own index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from displays import Lines
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.compute.blocks import BLOCKS, Blocks
from globe.fit.dictionary import unit_atoms
from globe.fit.sums import State
from globe.runs.job import Job
from globe.runs.stages import Stages
from globe.runs.store import MemoryStore, Store
from globe.seeds import SeedTask
from globe.seeds.pool import Pool
from globe.seeds.proxies import Rows, scan, split_rows
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.metric import Metric

Array = NDArray[np.float64]
CPU = torch.device("cpu")
# Settings for tests of anything but the joint fit and its metric: seconds less a run.
WEIGHTS_ONLY: dict[str, Any] = {"solver": "alternate", "calibrate": "none"}
WEIGHTS_ONLY_OPTIONS = ("--solver", "alternate", "--calibrate", "none")


def silent(steps: float) -> None:
    """Report no progress."""


def planted(
    seed: int, *, experts: int, p: int, d: int, rank: int, atoms: int, uses: int = 0, noise: float = 0.0
) -> Array:
    """Experts A_i Σ_j α_ij B_j plus noise of that relative size; every expert uses `uses` atoms (0: all)."""
    rng = np.random.default_rng(seed)
    bank = rng.standard_normal((atoms, rank, d))
    codes = rng.uniform(0.2, 1.0, (experts, atoms))
    if uses:
        codes *= rng.random((experts, atoms)).argsort(1) < uses
    weights = rng.standard_normal((experts, p, rank)) @ np.einsum("ij,jrd->ird", codes, bank)
    return weights + noise * weights.std() * rng.standard_normal(weights.shape)


def clustered(seed: int, *, groups: int, each: int, noise: float, p: int = 24, d: int = 32, rank: int = 8) -> Array:
    """Experts of `groups` kinds, kind by kind: a row space of its kind, and noise of that relative size."""
    rng = np.random.default_rng(seed)
    rights = np.linalg.qr(rng.standard_normal((groups, d, rank)))[0].swapaxes(1, 2)
    weights = rng.standard_normal((groups, each, p, rank)) @ rights[:, None]
    weights = weights.reshape(-1, p, d)
    return weights + noise * weights.std() * rng.standard_normal(weights.shape)


def write_checkpoint(directory: Path, dtype: torch.dtype = torch.float32, layers: int = 2, **families: Array) -> Path:
    """Write families, by name (gate, up, down), as an OLMoE checkpoint of `layers` layers."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, weights in families.items():
        per_layer = len(weights) // layers
        for number, matrix in enumerate(weights):
            layer, expert = divmod(number, per_layer)
            tensor = torch.from_numpy(np.ascontiguousarray(matrix)).to(dtype)
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {"model_type": "olmoe", "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def make_family(directory: Path, weights: Array, name: str = "gate") -> Family:
    """Write one family in fp32 and open it."""
    return Checkpoint(write_checkpoint(directory, **{name: weights})).family(name)


def make_rows(family: Family, rank: int, settings: Settings) -> Rows:
    """Split a family's rows as a run would."""
    return split_rows(family.p, rank, scan(family, settings, silent).row_energy, settings)


def make_pool(family: Family, rows: Rows, metric: Metric | None = None) -> Pool:
    """A family as the loops and the joint fit take it."""
    return Pool(family, Shape(len(rows.proxy), 1, 0), rows, metric)


def make_job(
    settings: Settings,
    *,
    blocks: Blocks = BLOCKS,
    store: Store | None = None,
    lines: list[str] | None = None,
    device: torch.device = CPU,
) -> Job:
    """A run that keeps its results in memory, unless told otherwise, and puts what it logs in `lines`."""
    display = Lines(lines)
    return Job(settings, device, blocks, Stages(display), store if store is not None else MemoryStore())


def whole_pool(family: Family, metric: Metric | None = None) -> Pool:
    """A family of which no row is held out."""
    everything = np.arange(family.p)
    return make_pool(family, Rows(everything, everything[:0], everything), metric)


def seed_task(
    family: Family, rows: Rows, size: int, *, block_bytes: int = 1 << 28, scratch: Path = Path("."), **changed: Any
) -> SeedTask:
    """Seed a family on the CPU; other keywords are settings, or `advance`."""
    advance = changed.pop("advance", silent)
    job = make_job(Settings(**changed), blocks=Blocks(proxy_bytes=block_bytes))
    return SeedTask(make_pool(family, rows), size, job, scratch, advance)


def random_state(seed: int, *, experts: int, atoms: int, rank: int, d: int, temperature: float = 1.0) -> State:
    """A bank of random unit atoms and random positive codes."""
    rng = np.random.default_rng(seed)
    bank = torch.from_numpy(rng.standard_normal((atoms, rank, d)).astype(np.float32))
    bank, _ = unit_atoms(bank, np.ones((1, atoms)))
    return State(bank, rng.uniform(0.1, 1.0, (experts, atoms)), temperature)
