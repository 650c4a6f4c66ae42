"""The error of finished compressions over the time of their fits, as a figure.

    python -m benchmarks.error_over_time FIGURE.svg OUT [OUT …]

A line for every pool of every OUT, from metrics.json: its error in the objective behind every loop and step, beginning
with the stages before it. A compression by an older version is read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click


@click.command(help=__doc__)
@click.argument("figure", type=click.Path(path_type=Path))
@click.argument("outs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(figure: Path, outs: tuple[Path, ...]) -> None:
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for out in outs:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        for name in metrics["families"]:
            minutes, errors = curve(metrics, name)
            axes.plot(minutes, errors, marker=".", label=f"{out.name}, {name}")
            click.echo(
                f"{out.name} {name}: " + "  ".join(f"{m:.1f} min {e:.4f}" for m, e in zip(minutes, errors, strict=True))
            )
    axes.set(xlabel="minutes since the start", ylabel="weighted error", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    drawn.savefig(figure)


def curve(metrics: Mapping[str, Any], pool: str) -> tuple[list[float], list[float]]:
    """Minutes since the start and errors, behind every loop and step of a pool's fit."""
    told = metrics["families"][pool]
    starts, passed = {}, 0.0
    for stage in metrics["stages"]:
        starts[stage["name"]] = passed
        passed += stage["seconds"]
    minutes, errors = [], []
    seconds = starts.get(f"{pool}: loops", 0.0)
    for record in told["history"]:
        seconds += record["seconds"]
        minutes.append(seconds / 60)
        errors.append(record.get("weighted_error") or record["relative_error"])
    for record in told.get("joint", {}).get("history", []):
        minutes.append((starts[f"{pool}: joint"] + record["seconds"]) / 60)
        errors.append(record["error"])
    return minutes, errors


if __name__ == "__main__":
    main()
