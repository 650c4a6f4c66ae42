"""The page: what was compressed, what to look at, and every section, of one run or of two side by side."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

from globe.artifact.card import bits_text
from globe.report.costs import costs_section
from globe.report.data import Run
from globe.report.findings import findings
from globe.report.judged import judged_section
from globe.report.sections import LETTERS, badge, banks_section, experts_section
from globe.report.svg import duration, escape, number, size, tag
from globe.settings import Settings

_OPTION = re.compile(r"(--[a-z-]+[a-z]|globe eval)")
_AXES = (
    ("touched", "of the matrices that were compressed", "What GloBE stores in place of the chosen families."),
    ("experts", "of all expert weights", "With the families left as they were."),
    ("checkpoint", "of the whole checkpoint", "With attention, embeddings and the rest."),
)


def render(runs: Sequence[Run]) -> str:
    """The report of one run, or of two, as a page of well-formed XML that is HTML too; it refers to nothing outside."""
    title = "GloBE report: " + " beside ".join(run.name for run in runs)
    style = importlib.resources.files("globe.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        + tag("title", escape(title))
        + tag("style", style)
    )
    sections = [
        ("summary", "What was compressed", _summary(runs)),
        ("warnings", "Worth a look", _warnings(runs)),
        ("judged", "Beside the original, on text", judged_section(runs)),
        ("experts", "Error of layers and experts", experts_section(runs)),
        ("banks", "Banks: what layers share, and how they were trained", banks_section(runs)),
        ("costs", "Time and memory", costs_section(runs)),
        ("settings", "Settings and source", _settings(runs)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(tag("a", escape(name), href=f"#{key}") for key, name, _ in sections)
    names = "".join(
        tag("p", badge(place, runs) + escape(run.name), class_="which")
        for place, run in enumerate(runs)
        if len(runs) > 1
    )
    body = "".join(tag("section", tag("h2", escape(name)) + content, id=key) for key, name, content in sections)
    header = tag("header", tag("h1", escape(title if len(runs) == 1 else "GloBE report: two runs")) + names)
    html = tag("head", head) + tag("body", header + tag("nav", links) + tag("main", body))
    return f'<!DOCTYPE html>\n<html lang="en">{html}</html>\n'


def _summary(runs: Sequence[Run]) -> str:
    cards = []
    for place, run in enumerate(runs):
        ratio, nbytes = run.metrics["ratio"], run.metrics["bytes"]
        letter = badge(place, runs)
        told = "".join(
            tag(
                "div",
                tag("b", f"{ratio[axis]:.3f}") + tag("span", f"{said}, {size(nbytes[axis])} before", title=about),
                class_="number",
            )
            for axis, said, about in _AXES
        )
        asked = run.settings.get("ratio")
        wanted = f" A ratio of {number(asked)} was asked for." if asked is not None else ""
        bits = bits_text(run.metrics.get("bits"))
        wanted += f" {bits[0].upper()}{bits[1:]}." if bits else ""
        words = (
            f"{' and '.join(run.settings['families'])} of {_source(run)}: {size(nbytes['checkpoint'])} became "
            f"{size(nbytes['stored'])}, in {duration(sum(one['seconds'] for one in run.metrics['stages']))}.{wanted} "
            "Stored weights over dense ones:"
        )
        cards.append(tag("div", letter + tag("p", escape(words)) + tag("div", told, class_="numbers"), class_="card"))
    heads = (
        "family", "p × d", "experts", "layers", "rank", "atoms", "relative error", "of the seeds", "weighted error",
        "median support",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys(family.name for run in runs for family in run.families):
        for place, family in [
            (place, one) for place, run in enumerate(runs) for one in run.families if one.name == name
        ]:
            report = family.report
            weighted = report.get("weighted_error")
            cells = (
                f"{family.p} × {family.d}", len(family.errors), len(set(family.layers.tolist())), family.rank,
                family.atoms, number(report["relative_error"]), number(report["init"]["relative_error"]),
                number(weighted) if weighted is not None else "–", number(report["support_median"]),
            )  # fmt: skip
            letter = badge(place, runs)
            rows.append(
                tag("tr", tag("th", letter + escape(family.name)) + "".join(tag("td", escape(one)) for one in cells))
            )
    head = tag("thead", tag("tr", "".join(tag("th", escape(one)) for one in heads)))
    table = tag("div", tag("table", head + tag("tbody", "".join(rows))), class_="scroll")
    return tag("div", "".join(cards), class_="cards") + table


def _warnings(runs: Sequence[Run]) -> str:
    parts = []
    for place, run in enumerate(runs):
        found = findings(run)
        letter = badge(place, runs)
        rows = "".join(
            tag(
                "li",
                tag("b", "Warning. " if one.warning else "Note. ") + _OPTION.sub(r"<code>\1</code>", escape(one.text)),
                class_="warning" if one.warning else "note",
            )
            for one in found
        )
        none = "" if any(one.warning for one in found) else tag("p", "No warnings.", class_="fine")
        parts.append(tag("div", letter + none + (tag("ul", rows) if rows else ""), class_="card"))
    return tag("div", "".join(parts), class_="cards")


def _settings(runs: Sequence[Run]) -> str:
    defaults = Settings().as_dict()
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [_plain(run.settings.get(key)) for run in runs]
        default = _plain(defaults[key]) if key in defaults else "–"
        kind = "differs" if len(set(values)) > 1 else "changed" if values[0] != default else None
        cells = "".join(tag("td", escape(value)) for value in [*values, default])
        rows.append((kind, tag("tr", tag("th", escape(key)) + cells, class_=kind)))
    ordered = [row for kind in ("differs", "changed", None) for found, row in rows if found == kind]
    heads = ["setting", *(LETTERS[place] if len(runs) > 1 else "value" for place in range(len(runs))), "default"]
    told = "Settings other than the default are bold and come first."
    if len(runs) > 1:
        told = "First and marked: what differs between the runs. Bold: the same in both, but not the default."
    return (
        tag("div", _table(_origins(runs), ["", *heads[1:-1]]), class_="scroll")
        + tag("p", told)
        + tag("div", _table(ordered, heads), class_="scroll")
    )


def _origins(runs: Sequence[Run]) -> list[str]:
    """Where the runs come from and what they ran on, a row each."""
    told = [_origin(run) for run in runs]
    keys = dict.fromkeys(key for one in told for key in one)
    return [
        tag("tr", tag("th", escape(key)) + "".join(tag("td", escape(one.get(key, "–"))) for one in told))
        for key in keys
    ]


def _origin(run: Run) -> dict[str, str]:
    metrics, source, calibration = run.metrics, run.metrics["source"], run.metrics.get("calibration")
    found = {
        "source": source["path"],
        "layout": source["layout"],
        "source fingerprint": source["fingerprint"],
        "GloBE": metrics.get("globe_version", "–"),
        "device": f"{metrics.get('device')}, {metrics.get('threads')} threads",
        "precision": ", ".join(f"{key} {value}" for key, value in metrics.get("precision", {}).items()),
        "calibration": "none",
    }
    if calibration is not None:
        found["calibration"] = f"{calibration.get('tokens')} tokens of {calibration.get('text')}"
    for name, pool in metrics.get("pools", metrics["families"]).items():
        seeds = pool.get("seeds")
        if seeds:
            found[f"seeds of {name}"] = f"{seeds.get('chosen')} ({seeds.get('why')})"
    for name, file in metrics.get("files", {}).items():
        found[name] = f"{size(file['bytes'])}, SHA-256 {file['sha256']}"
    return found


def _table(rows: Sequence[str], heads: Sequence[str]) -> str:
    head = tag("thead", tag("tr", "".join(tag("th", escape(one) or " ") for one in heads)))
    return tag("table", head + tag("tbody", "".join(rows)), class_="facts")


def _source(run: Run) -> str:
    path = str(run.metrics["source"]["path"]).rstrip("/")
    return path.rpartition("/")[2] or path


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
