"""The demo's tables: what was saved, how well the model still predicts, how it goes on, and what all that cost."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from globe.settings import seconds_text


def demo_table(found: dict[str, Any]) -> Table:
    """Bytes, errors and perplexities, before and after."""
    families = " and ".join(found["choices"]["families"])
    table = Table(title=f"SmolLM2-135M as a mixture of 30 × 4 experts, {families} factored")
    for column in ("what", "before", "after", "times"):
        table.add_column(column, justify="left" if column == "what" else "right", overflow="fold")
    labels = {"touched": "touched matrices", "experts": "all expert weights", "checkpoint": "checkpoint"}
    for axis, label in labels.items():
        dense, ratio = found["bytes"][axis], found["ratio"][axis]
        table.add_row(f"bytes, {label}", f"{dense:,}", f"{round(dense * ratio):,}", f"{ratio:.3f}")
    for name, error in found["relative_error"].items():
        table.add_row(f"relative error, {name}", "0", f"{error:.4f}", "")
    for row in found["texts"]:
        shown = (f"{row['reference_perplexity']:.2f}", f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}")
        table.add_row(f"perplexity, {row['text']}", *shown)
    table.add_row("perplexity, geometric mean", "", "", f"{found['geometric_mean']:.3f}")
    return table


def sentences_table(found: dict[str, Any]) -> Table:
    """How both models go on from every prompt, side by side."""
    table = Table(title="how both go on, greedily", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for each in found["sentences"]:
        table.add_row(f"{each['prompt']} …", each["before"], each["after"])
    return table


def cost_line(found: dict[str, Any]) -> str:
    """What the demo took, part by part."""
    seconds = found["seconds"]
    parts = ", ".join(f"{name} {seconds_text(taken)}" for name, taken in seconds.items() if taken > 0)
    peak = max(stage["peak_rss_bytes"] for stage in found["stages"])
    return f"{parts}: {seconds_text(sum(seconds.values()))} in all, {peak / 2**30:.2f} GiB at the peak"
