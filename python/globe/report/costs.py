"""Time and memory of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from globe.report.charts import levels
from globe.report.data import Run
from globe.report.sections import Figures, side_by_side
from globe.report.svg import duration, escape, number, size, tag

_MOST_STAGES = 24

Stage = dict[str, Any]


def costs_section(runs: Sequence[Run]) -> str:
    """Time and memory of every stage, as bars and as a table; where stages are many, those of one kind together."""
    grouped = [_stages(run.metrics["stages"]) for run in runs]
    seconds = max((float(one["seconds"]) for stages in grouped for one in stages), default=0.0)
    memory = max((float(one["peak_rss_bytes"]) for stages in grouped for one in stages), default=0.0)
    each: list[Figures] = []
    for run, stages in zip(runs, grouped, strict=True):
        whole, where = duration(sum(one["seconds"] for one in stages)), run.metrics.get("device")
        about = f"Wall time, {whole} in all, on {where} with {run.metrics.get('threads')} threads."
        times = [(one["name"], float(one["seconds"]), _said(one)) for one in stages]
        peaks = [(one["name"], float(one["peak_rss_bytes"]), _said(one)) for one in stages]
        never = "Largest resident memory of the process so far, which never falls."
        each.append(
            [
                levels("Time of each stage", times, about=about, top=seconds, format_=duration),
                levels("Peak memory at the end of each stage", peaks, about=never, top=memory, format_=size),
                _table(stages),
            ]
        )
    return side_by_side(each)


def _said(stage: Stage) -> str:
    return f"{stage['name']}: {duration(stage['seconds'])}, {size(stage['peak_rss_bytes'])}"


def _table(stages: Sequence[Stage]) -> str:
    heads = "".join(tag("th", one) for one in ("stage", "seconds", "read", "passes", "peak memory", "resumed"))
    rows = []
    for one in stages:
        passes = number(one["passes"], 3) if one.get("passes") is not None else "–"
        resumed = "yes" if one["resumed"] else "no"
        cells = (number(one["seconds"], 3), size(one["bytes_read"]), passes, size(one["peak_rss_bytes"]), resumed)
        rows.append(tag("tr", tag("th", escape(one["name"])) + "".join(tag("td", cell) for cell in cells)))
    table = tag("table", tag("thead", tag("tr", heads)) + tag("tbody", "".join(rows)))
    return tag("figure", tag("figcaption", tag("b", "Stages")) + tag("div", table, class_="scroll"))


def _stages(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, or where they are many, one for each kind: gate: loops and up: loops are loops."""
    if len(stages) <= _MOST_STAGES:
        return list(stages)
    kinds: dict[str, list[Stage]] = {}
    for one in stages:
        kinds.setdefault(one["name"].rpartition(": ")[2], []).append(one)
    return [
        {
            "name": kind if len(held) == 1 else f"{kind} ({len(held)})",
            "seconds": sum(one["seconds"] for one in held),
            "bytes_read": sum(one["bytes_read"] for one in held),
            "peak_rss_bytes": max(one["peak_rss_bytes"] for one in held),
            "resumed": any(one["resumed"] for one in held),
        }
        for kind, held in kinds.items()
    ]
