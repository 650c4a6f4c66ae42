"""What quality.py shows: the table, and error against seconds as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

GLOBE = "globe-"


def show(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """One line a row; what could not run comes after, with its reason."""
    console = console or Console(width=None if Console().is_terminal else 160)
    done = [row for row in rows if "error" not in row]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    texts = list(dict.fromkeys(name for row in done for name in row.get("ratios", {})))
    columns = (
        "method",
        "metric",
        "MB",
        "stored",
        "rel. error",
        "weighted",
        "KL",
        "top-1",
        "seconds",
        "GiB",
        "mean",
        *texts,
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "metric") else "right", no_wrap=True)
    for row in done:
        families = row["families"].values()
        errors = " / ".join(f"{found['relative_error']:.4f}" for found in families)
        weighted = [found["weighted_error"] for found in families]
        shown = " / ".join(f"{error:.4f}" for error in weighted) if None not in weighted else "-"
        judged = [f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in _JUDGED]
        spent = (f"{row['seconds']:.1f}", f"{row['peak_rss_bytes'] / 2**30:.2f}")
        size = (f"{row['stored_bytes'] / 1e6:.2f}", f"{row['stored_bytes'] / row['dense_bytes']:.3f}")
        ratios = [row.get("geometric_mean"), *(row.get("ratios", {}).get(name) for name in texts)]
        times = [f"{ratio:,.3f}" if ratio is not None else "-" for ratio in ratios]
        table.add_row(row["method"], row["metric"], *size, errors, shown, *judged, *spent, *times)
    console.print(table)
    original = next((row["original_perplexities"] for row in done if row.get("original_perplexities")), None)
    if original is not None:
        said = ", ".join(f"{name} {perplexity:.3f}" for name, perplexity in original.items())
        line = f"the original: perplexity {said}; the last columns are times that, with their geometric mean"
        console.print(line, highlight=False, soft_wrap=True)
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']}@{row['metric']}: {row['error']}", highlight=False, markup=False)


_JUDGED = (("kl", ".4f"), ("top1_agreement", ".1%"))


def curves(rows: Sequence[dict[str, Any]], error: str) -> dict[str, list[tuple[float, float]]]:
    """Points (seconds, error) of every method and metric, in order of time.

    A row is a point. A weight-only row of GloBE has the history of its relative error before it; in a metric the
    history is of the fit's own objective, which is another.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(error) is None:
            continue
        points = found.setdefault(f"{row['method']}, {row['metric']}", [])
        points += _history(row, error)
        points.append((row["seconds"], row[error]))
    return {name: sorted(points) for name, points in found.items()}


def _history(row: dict[str, Any], error: str) -> list[tuple[float, float]]:
    """After loop k of all families: the seconds of all so far, the error of all together."""
    histories = row.get("history") or {}
    if not histories or error != "relative_error" or row["metric"] != "weights":
        return []
    energies = {name: row["families"][name]["relative_energy"] for name in histories}
    seconds = {name: row["seed_seconds"][name] for name in histories}
    points = []
    for loop in range(max(map(len, histories.values()))):
        for name, records in histories.items():
            seconds[name] += records[loop]["seconds"] if loop < len(records) else 0.0
        errors = {name: records[min(loop, len(records) - 1)][error] for name, records in histories.items() if records}
        total = sum(energies[name] * value for name, value in errors.items()) / sum(energies.values())
        points.append((sum(seconds.values()), total))
    return points


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Relative and weighted error against seconds, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"relative_error": "relative error of the weights", "weighted_error": "activation-weighted error"}
    panels = {error: found for error in titles if (found := curves(rows, error))}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(names)}
    for axis, (error, found) in zip(axes[0], panels.items(), strict=True):
        for name, points in found.items():
            marker = "*" if name.startswith(GLOBE) else "o"
            axis.plot(*zip(*points, strict=True), marker=marker, color=colours[name], label=name)
        axis.set(xscale="log", yscale="log", xlabel="seconds", ylabel=titles[error])
        axis.grid(True, which="both", alpha=0.25)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)
