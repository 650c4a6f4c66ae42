"""Other forms as factored directories, so that corrections, healing and evaluation are those of GloBE's own.

python -m benchmarks.factored_baselines svd MODEL OUT --ratio 0.688 --calibrate FILE [--correct down]
python -m benchmarks.factored_baselines shared MODEL OUT --ratio 0.688 --calibrate FILE [--correct down]

`svd` is the truncated SVD of every D_i W_i L_i, which is SVD-LLM (arXiv 2403.07378) with rows weighed too: as many
atoms
as experts, each with a code of one. `shared` is one right subspace for all experts of a layer: as many atoms as layers.
Both are optimal in their form, so nothing is fitted behind them but the left factors. `globe heal` and `globe eval`
take OUT as they take any.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from globe.checkpoint.index import Checkpoint
from globe.compute.gemm import matmul
from globe.pipeline.compress import compress
from globe.runs.display import RichDisplay
from globe.seeds import METHODS, Method, Seeds, SeedTask
from globe.settings import Settings

FORMS = ("svd", "shared")


@click.command(help=__doc__)
@click.argument("form", type=click.Choice(FORMS))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--ratio", default=0.688, show_default=True, help="Bytes stored over bytes of gate and up.")
@click.option("--calibrate", required=True, help="A file of globe calibrate.")
@click.option("--correct", default="down", show_default=True)
def main(form: str, model: Path, out: Path, ratio: float, **options: Any) -> None:
    family = Checkpoint(model).family("gate")
    atoms = len(family) if form == "svd" else family.layers
    rank = int(ratio * len(family) * family.p * family.d / (len(family) * family.p + atoms * family.d))
    settings = Settings(
        families=("gate", "up"),
        rank=rank,
        bank_size=atoms,
        method="grouped-subspace",
        solver="alternate",
        outer_loops=0,
        codes="nnls",
        **options,
    )
    method = Method(best_subspaces, lambda settings: 1, sees_all_rows=True)
    with patch.dict(METHODS, {"grouped-subspace": method}):
        metrics = compress(model, out, settings, progress=RichDisplay()).metrics
    told = {name: found["relative_error"] for name, found in metrics["families"].items()}
    click.echo(json.dumps({"form": form, "rank": rank, "atoms": atoms, "ratio": metrics["ratio"]["touched"], **told}))


def best_subspaces(task: SeedTask) -> Seeds:
    """One atom for every expert, or for all of a layer, whichever the bank has room for: the best rows for them alone.

    With X = D W L, of one expert or of a layer's stacked (L then is the layer's own), U the r leading left singular
    vectors: rows UᵀD W, which span what truncating the SVD of X keeps.
    """
    family, metric = task.family, task.pool.metric
    assert metric is not None
    layers = [expert.layer for expert in family.experts]
    alone = task.size == len(family)
    groups = [[number] for number in range(len(family))] if alone else _same(layers)
    metric = metric if alone else replace(metric, own=None, scales=None)
    bank = torch.zeros(task.size, task.rank, family.d)
    codes, kept, whole = np.zeros((len(family), task.size)), 0.0, 0.0
    for atom, members in enumerate(groups):
        some = slice(members[0], members[-1] + 1)
        weights = torch.stack([family.read(number).float() for number in members])
        seen = metric.weigh(some, weights).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(seen.mT @ seen)
        right = vectors[:, -task.rank :]
        rows = matmul(right.mT @ seen.mT, metric.weigh_rows(some, weights).flatten(0, 1).double())
        bank[atom] = torch.linalg.qr(rows.mT)[0].mT / task.rank**0.5
        codes[members, atom] = 1.0
        kept, whole = kept + float(values[-task.rank :].sum()), whole + float(values.sum())
        task.advance(len(members) / len(family))
    return Seeds(bank, codes, kept / whole, 1 - kept / whole)


def _same(layers: list[int]) -> list[list[int]]:
    """The experts of every layer, which follow each other."""
    return [[number for number, each in enumerate(layers) if each == layer] for layer in sorted(set(layers))]


if __name__ == "__main__":
    main()
