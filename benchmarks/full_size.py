"""A whole compression at full size: seconds and peak memory of every stage, beside per-expert SVD.

python -m benchmarks.synthetic MODEL --like qwen1.5-moe-a2.7b [--layers 6 --statistics FILE]
python benchmarks/full_size.py MODEL OUT [--families gate,up] [--outer-loops 0] [--mod aligned] [--max-memory 6GiB]
                                         [--solver joint --joint-steps 6 --calibrate FILE]

The SVD of the same experts (torch.linalg.svd, full_matrices=False, fp32, all cores) is timed on ten of them in the same
process, and so is a product of 1,408 × 2,048 and 2,048 × 704 matrices: the floor under the time of the left factors.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.pipeline.compress import compress
from globe.runs.display import RichDisplay
from globe.settings.yaml_file import read_settings


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--families", default="gate,up", show_default=True)
@click.option("--rank", default=704, show_default=True)
@click.option("--bank-size", default=180, show_default=True)
@click.option("--method", default="ts-pca", show_default=True)
@click.option("--outer-loops", default=0, show_default=True)
@click.option("--mod", default="aligned", show_default=True)
@click.option("--solver", default="alternate", show_default=True)
@click.option("--joint-steps", default=6, show_default=True)
@click.option("--calibrate", default="none", show_default=True)
@click.option("--max-memory", default="6GiB", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
def main(model: Path, out: Path, json_file: Path | None, **options: Any) -> None:
    settings = read_settings(None, options)
    metrics = compress(model, out, settings, fresh=True, overwrite=True, progress=RichDisplay()).metrics
    family = Checkpoint(model).family(settings.families[0])
    experts = len(family) * len(settings.families)
    seconds = sum(stage["seconds"] for stage in metrics["stages"])
    loops = {
        name: [round(record["seconds"], 1) for record in found["history"]]
        for name, found in metrics["families"].items()
    }
    svd = _svd_seconds(family)
    figures = {
        "experts": experts,
        "seconds": seconds,
        "seconds_per_expert": seconds / experts,
        "peak_gib": max(stage["peak_rss_bytes"] for stage in metrics["stages"]) / 2**30,
        "loop_seconds": loops,
        "svd_seconds_per_expert": svd,
        "svd_over_ours": svd * experts / seconds,
        "gemm_gflops": _gemm_rate(family.p, family.d, settings.resolve_rank(family.p, family.d)),
        "relative_error": {name: found["relative_error"] for name, found in metrics["families"].items()},
        "stages": metrics["stages"],
    }
    click.echo(f"{'stage':16} {'seconds':>8} {'GB read':>8} {'peak GiB':>9}")
    for stage in metrics["stages"]:
        read, peak = stage["bytes_read"] / 1e9, stage["peak_rss_bytes"] / 2**30
        click.echo(f"{stage['name']:16} {stage['seconds']:8.1f} {read:8.1f} {peak:9.2f}")
    for name, value in figures.items():
        if name != "stages":
            click.echo(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _svd_seconds(family: Family) -> float:
    """Seconds of a truncated SVD of one expert, the median of ten evenly spaced ones."""
    times = []
    for number in range(0, len(family), -(-len(family) // 10)):
        weights = family.read(number).float()
        started = time.perf_counter()
        torch.linalg.svd(weights, full_matrices=False)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _gemm_rate(p: int, d: int, rank: int) -> float:
    """GFLOP a second of W B̃ᵀ in fp32 on all cores."""
    left, right = torch.randn(p, d), torch.randn(d, rank)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2e-9 * p * d * rank / statistics.median(times)


if __name__ == "__main__":
    main()
