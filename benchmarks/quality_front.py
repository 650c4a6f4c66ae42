"""Bytes against perplexity: a plot with a panel for every text, and the table beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_report import GLOBE

Row = dict[str, Any]
_MEAN = "geometric mean"


def write_front(rows: Sequence[Row], file: Path) -> None:
    """Draw to `file` what the rows have of bytes and perplexity, and write the table to the same name in .md."""
    judged = [row for row in rows if row.get("geometric_mean") is not None]
    if judged:
        file.with_suffix(".md").write_text(table(judged), encoding="utf-8")
        _draw(judged, file)


def share(row: Row) -> float:
    """Bytes stored over those of the families in bf16."""
    return float(row["stored_bytes"] / row["dense_bytes"])


def times(row: Row, text: str) -> float:
    """Perplexity over the original's, of a text or in the geometric mean."""
    return float(row["geometric_mean"] if text == _MEAN else row["ratios"][text])


def front(rows: Sequence[Row], text: str) -> list[Row]:
    """The rows that no other undercuts in bytes without a higher perplexity, by bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (share(row), times(row, text))):
        if not found or times(row, text) < times(found[-1], text):
            found.append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """By bytes; perplexities are times the original's, and those of the front are bold."""
    texts = [_MEAN, *rows[0]["ratios"]]
    fronts = {text: front(rows, text) for text in texts}
    lines = [f"| method | metric | stored | {' | '.join(texts)} |", "| --- " * (3 + len(texts)) + "|"]
    for row in sorted(rows, key=share):
        cells = [f"{times(row, text):,.3f}" for text in texts]
        cells = [f"**{cell}**" if row in fronts[text] else cell for cell, text in zip(cells, texts, strict=True)]
        lines.append(f"| {row['method']} | {row['metric']} | {share(row):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw(rows: Sequence[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot, ticker

    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=share):
        series.setdefault(_series(row), []).append(row)
    texts = [_MEAN, *rows[0]["ratios"]]
    columns = min(3, len(texts))
    lines = -(-len(texts) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(texts) :]:
        axis.set_visible(False)
    for axis, text in zip(axes.flat, texts, strict=False):
        for number, (name, found) in enumerate(series.items()):
            look = {"marker": "*" if name.startswith(GLOBE) else "o", "color": pyplot.get_cmap("tab20")(number % 20)}
            axis.plot([share(row) for row in found], [times(row, text) for row in found], label=name, **look)
        best = front(rows, text)
        points = [share(row) for row in best], [times(row, text) for row in best]
        axis.step(*points, where="post", color="black", linewidth=0.8, linestyle=":", label="front")
        axis.set(
            xscale="log", yscale="log", title=text, xlabel="bytes over bf16", ylabel="perplexity over the original's"
        )
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(ticker.MaxNLocator(5))
            scale.set_major_formatter(ticker.FormatStrFormatter("%g"))
            scale.set_minor_locator(ticker.NullLocator())
        axis.grid(True, alpha=0.25)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.tight_layout()
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)


def _series(row: Row) -> str:
    """Points of one line: whole experts by method, factors by method and bits."""
    name, _, bits = row["method"].partition(":")
    return f"{name} {bits or 'bf16'}, {row['metric']}" if row["ratio"] is not None else f"{name}, {row['metric']}"
