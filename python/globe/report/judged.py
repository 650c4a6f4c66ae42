"""What `globe eval` found against the original: a table for the page, and one for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from globe.artifact.card import JUDGED, with_section
from globe.checkpoint.tensorfile import write_text
from globe.evaluation.perplexity import Evaluation, geometric_mean
from globe.evaluation.record import warning
from globe.report.data import Run
from globe.report.sections import badge
from globe.report.svg import escape, number, percent, tag

_CARD = "README.md"
_HEADS = ("text", "tokens", "original", "compressed", "times", "KL", "top-1")


def judged_section(runs: Sequence[Run]) -> str:
    """A row for every text of every run, and the geometric mean of each; empty where none was judged."""
    rows = []
    for place, run in enumerate(runs):
        if not run.judged:
            continue
        for each in run.judged:
            rows.append((badge(place, runs) + escape(each.text), _cells(each)))
        mean = number(geometric_mean(run.judged))
        rows.append((badge(place, runs) + tag("b", "geometric mean"), ("", "", "", mean, "", "")))
    if not rows:
        return ""
    head = tag("thead", tag("tr", "".join(tag("th", escape(one)) for one in _HEADS)))
    body = "".join(
        tag("tr", tag("th", first) + "".join(tag("td", escape(one)) for one in cells)) for first, cells in rows
    )
    told = "Perplexity on text that was not calibrated on, times the original's, as globe eval found it."
    return tag("p", told) + tag("div", tag("table", head + tag("tbody", body)), class_="scroll")


def write_card(directory: Path, judged: Sequence[Evaluation]) -> None:
    """Put what was judged into the model card of an output, or take out what was of other weights."""
    card = directory / _CARD
    if not card.is_file():
        return
    before = card.read_text(encoding="utf-8")
    after = with_section(before, JUDGED, _markdown(judged) if judged else None)
    if after != before:
        write_text(card, after)


def _markdown(judged: Sequence[Evaluation]) -> str:
    lines = [f"| {' | '.join(_HEADS)} |", f"|{' --- |' * len(_HEADS)}"]
    lines += [f"| {each.text.replace('|', chr(92) + '|')} | {' | '.join(_cells(each))} |" for each in judged]
    lines += ["", f"Geometric mean: {number(geometric_mean(judged))} times the original's perplexity."]
    said = warning(judged)
    return "\n".join([*lines, *(["", f"**{said}**"] if said else [])])


def _cells(each: Evaluation) -> tuple[str, ...]:
    compared = (each.reference_perplexity or 0.0, each.perplexity, each.ratio, each.kl or 0.0)
    return (f"{each.tokens:,}", *map(number, compared), percent(each.top1_agreement or 0.0))
