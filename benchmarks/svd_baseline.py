"""Relative error of per-expert truncated SVD at a given rank: the first thing anybody would try.

python benchmarks/svd_baseline.py MODEL [--family gate] [--rank 158]

Rank 158 of a 384 × 576 matrix takes 158 · (384 + 576) weights, 0.686 of the dense ones.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from globe.checkpoint.index import Checkpoint


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--family", default="gate")
@click.option("--rank", type=int, default=158)
def main(model: Path, family: str, rank: int) -> None:
    experts = Checkpoint(model).family(family)
    error = energy = 0.0
    for number in range(len(experts)):
        values = torch.linalg.svdvals(experts.read(number).float()).double().pow(2)
        error += float(values[rank:].sum())
        energy += float(values.sum())
    click.echo(f"{family}: rank {rank}, relative error {error / energy:.4f}")


if __name__ == "__main__":
    main()
