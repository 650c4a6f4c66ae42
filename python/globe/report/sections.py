"""The parts of the report about experts, banks and training: charts of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from globe.report.charts import Series, bars, even_edges, figure, heat_map, line, span
from globe.report.data import Array, FamilyView, PoolView, Run
from globe.report.svg import escape, number, percent, tag, text

LETTERS = "AB"
_OPEN_POOLS = 4
_SHARES = (1e-9, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
_SHARE_NAMES = (
    "unused",
    "below 1 %",
    "1 – 2 %",
    "2 – 5 %",
    "5 – 10 %",
    "10 – 20 %",
    "20 – 40 %",
    "40 – 60 %",
    "60 % or more",
)
_OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

Figures = list[str]
_Errors = Callable[[FamilyView], Array | None]


def badge(place: int, runs: Sequence[object]) -> str:
    """The letter of a run, where there are two."""
    return tag("span", LETTERS[place], class_=f"run r{place}") if len(runs) > 1 else ""


def side_by_side(each: Sequence[Figures]) -> str:
    """The figures of one run in a grid; of two runs in rows of two, for the same thing."""
    if len(each) == 1:
        return tag("div", "".join(each[0]), class_="grid")
    absent = figure("", "", text(210, 40, "not in this run"), 420, 80)
    rows = [
        "".join(tag("div", badge(place, each) + (one or absent), class_="cell") for place, one in enumerate(pair))
        for pair in zip_longest(*each)
    ]
    return tag("div", "".join(tag("div", row, class_="pair") for row in rows), class_="pairs")


def experts_section(runs: Sequence[Run]) -> str:
    """Error by layer, then by expert, family by family; the scales of two runs are the same."""
    kinds: list[tuple[str, _Errors, str]] = [
        ("Relative error", lambda family: family.errors, "‖W − Ŵ‖² / ‖W‖²: 0 is lossless, 1 is nothing kept."),
        (
            "Activation-weighted error",
            lambda family: family.weighted,
            "The same on what the experts are given in the calibration text: what the fit lowers.",
        ),
    ]
    each: list[Figures] = [[] for _ in runs]
    for title, errors_of, about in kinds[::-1]:
        present = [
            (run, family, errors)
            for run in runs
            for family in run.families
            if (errors := errors_of(family)) is not None
        ]
        if not present:
            continue
        y_range = span([float(errors.max()) for _, _, errors in present])
        for run, figures in zip(runs, each, strict=True):
            series = []
            for colour, (_, family, errors) in enumerate(one for one in present if one[0] is run):
                layers, mean, worst = family.by_layer(errors)
                series.append(Series(f"{family.name}, mean", layers, mean, colour))
                series.append(Series(f"{family.name}, worst expert", layers, worst, colour, dashed=True))
            said = f"{about} The mean of each layer's experts, and the worst of them."
            figures.append(line(f"{title} by layer", series, "layer", title.lower(), about=said, y_range=y_range))
    names = dict.fromkeys(family.name for run in runs for family in run.families)
    for name in names:
        held = [next((one for one in run.families if one.name == name), None) for run in runs]
        for title, errors_of, _ in kinds[::-1]:
            for figures, drawn in zip(each, _by_expert(title, name, held, errors_of), strict=True):
                figures.append(drawn)
    for place in reversed(range(max(map(len, each)))):  # what neither run has
        if not any(figures[place] for figures in each):
            for figures in each:
                del figures[place]
    return side_by_side(each)


def _by_expert(title: str, name: str, held: Sequence[FamilyView | None], errors_of: _Errors) -> Figures:
    """A family's experts × layers in each run; "" where there are none."""
    seen = [(family, errors_of(family)) if family is not None else (None, None) for family in held]
    present = [errors for _, errors in seen if errors is not None]
    if not present:
        return ["" for _ in held]
    everything, drawn = np.concatenate(present), []
    edges = even_edges(float(everything.min()), float(everything.max()))
    for family, errors in seen:
        if family is None or errors is None:
            drawn.append("")
            continue
        grid, layers = family.grid(errors)
        what, about, rows = f"{title} by expert, {name}", f"One cell is one expert of {name}.", range(len(grid))
        drawn.append(heat_map(what, grid, rows, layers, "expert", "layer", edges, about=about, format_=_three))
    return drawn


def _three(value: float) -> str:
    return number(value, 3)


def banks_section(runs: Sequence[Run]) -> str:
    """Every bank: its usage map, what layers share, supports and popularity, and its training."""
    names = list(dict.fromkeys(pool.name for run in runs for pool in run.pools))
    parts = []
    for name in names:
        held = [next((pool for pool in run.pools if pool.name == name), None) for run in runs]
        charts = [_bank(pool, run, held) if pool is not None else [] for pool, run in zip(held, runs, strict=True)]
        facts = "".join(
            tag("p", badge(place, runs) + escape(_sharing(pool)), class_="fact")
            for place, pool in enumerate(held)
            if pool is not None
        )
        head = tag("summary", tag("h3", f"Bank {escape(name)}"))
        parts.append(
            tag("details", head + facts + side_by_side(charts), open="" if len(names) <= _OPEN_POOLS else None)
        )
    return "".join(parts)


def _bank(pool: PoolView, run: Run, held: Sequence[PoolView | None]) -> Figures:
    others = [one for one in held if one is not None]
    return [
        *_usage(pool),
        _support(pool, run, others),
        _popularity(pool, others),
        *_training(pool, others),
    ]


def _sharing(pool: PoolView) -> str:
    reach = (pool.users > 0).sum(1)
    used = reach[reach > 0]
    experts = int(pool.held.sum())
    said = f"{pool.atoms} atoms of rank {pool.rank} for {experts} experts of {len(pool.layers)} layer"
    if len(pool.layers) == 1:
        return f"{said}: no other layer shares them."
    alone = int((used == 1).sum())
    return (
        f"{said}s. Half of the atoms in use serve {number(float(np.median(used)))} layers or more, {alone} serve one "
        f"alone; two layers have {percent(_mean_overlap(pool))} of their weight on the same atoms, on average."
    )


def _mean_overlap(pool: PoolView) -> float:
    alike, count = pool.alike(), len(pool.layers)
    return float((alike.sum() - np.trace(alike)) / (count * (count - 1)))


def _usage(pool: PoolView) -> Figures:
    order = pool.order()
    weight, users = pool.weight[order], pool.users[order]

    def said(atom: int, layer: int) -> str:
        used = f"used by {users[atom, layer]} of {pool.held[layer]} experts"
        share = percent(float(weight[atom, layer]))
        return f"atom {order[atom]}, layer {pool.layers[layer]}: {share} of the weight, {used}"

    about = (
        "How much of each layer's mixtures an atom makes up: its share of the codes' sum, over the layer's experts. "
        "Atoms are in order of the mean layer they serve, those of no use last."
    )
    name, atoms = f"Which layers use which atoms, {pool.name}", order.tolist()
    drawn = heat_map(
        name, weight, atoms, pool.layers, "atom", "layer", _SHARES, about=about, scale=_SHARE_NAMES, tips=said
    )
    found = [drawn]
    if len(pool.layers) > 1:
        about = "The part of two layers' weight that lies on the same atoms: 0 % share nothing, 100 % mix the same."
        name = f"What layers share, {pool.name}"
        layers = pool.layers
        found.append(
            heat_map(name, pool.alike(), layers, layers, "layer", "layer", _OVERLAPS, about=about, format_=percent)
        )
    return found


def _support(pool: PoolView, run: Run, others: Sequence[PoolView]) -> str:
    histograms = [np.asarray(one.report["support_histogram"], dtype=float) for one in others]
    places = np.concatenate([np.flatnonzero(one) for one in histograms])
    first, last = int(places.min(initial=pool.atoms)), int(places.max(initial=0))
    counts = np.zeros(last + 1 - first)
    own = np.asarray(pool.report["support_histogram"], dtype=float)[first : last + 1]
    counts[: len(own)] = own
    steered = run.settings.get("codes") in ("entmax", "sparsemax")
    about = f"Atoms that an expert mixes; the median is {number(pool.report['support_median'])}."
    return bars(
        f"Support, {pool.name}",
        counts.tolist(),
        "atoms an expert uses",
        "experts",
        first=first,
        about=about,
        top=float(max(one.max() for one in histograms)),
        mark=(run.settings["support"], f"target {run.settings['support']}") if steered else None,
    )


def _popularity(pool: PoolView, others: Sequence[PoolView]) -> str:
    counts = pool.users.sum(1)
    order = np.argsort(-counts, kind="stable")
    reach = (pool.users > 0).sum(1)
    tips = [f"atom {atom}: {counts[atom]} experts of {reach[atom]} layers" for atom in order]
    about = f"Experts that use each atom, the most popular first; {int((counts == 0).sum())} are used by none."
    top = float(max(one.users.sum(1).max() for one in others))
    what = f"Popularity of atoms, {pool.name}"
    return bars(what, counts[order].tolist(), "place of the atom", "experts", first=1, about=about, top=top, tips=tips)


def course(pool: PoolView) -> dict[str, list[tuple[float, float]]]:
    """(passes, value) over the loops, or the evaluations of the joint fit; where there are both they go on counting.

    Loops begin with the seeds at pass 0, the joint fit with its first evaluation.
    """
    report = pool.report
    loops, joint = report.get("history", []), (report.get("joint") or {}).get("history", [])
    shift = loops[-1]["loop"] if loops else 0
    weighted = report.get("weighted_error") is not None
    seeds = report["init"]["relative_error"]
    alternated = [(0, seeds), *((one["loop"], one["relative_error"]) for one in loops)] if loops or not joint else []
    found = {
        "relative error, loops": alternated,
        "held-out rows, loops": [
            (one["loop"], one["validation_error"]) for one in loops if one["validation_error"] is not None
        ],
        f"{'activation-weighted' if weighted else 'relative'} error, joint fit": [
            (shift + one["evaluations"], one["error"]) for one in joint
        ],
    }
    steps = [(one["loop"], one) for one in loops] + [(shift + one["evaluations"], one) for one in joint]
    found["temperature"] = [(x, one["temperature"]) for x, one in steps]
    found["support"] = [(x, one["support_median"]) for x, one in steps]
    return found


def _training(pool: PoolView, others: Sequence[PoolView]) -> Figures:
    courses, own = [course(one) for one in others], course(pool)
    loops, joint = pool.report.get("history", []), (pool.report.get("joint") or {}).get("history", [])
    marks = [(float(loops[-1]["loop"]) + 0.5, "joint fit")] if loops and joint else []
    errors = [name for name in own if "error" in name or "rows" in name]
    values = [
        y for one in courses for name, points in one.items() for _, y in points if "error" in name or "rows" in name
    ]
    x_label, log = "passes over the experts", bool(values) and max(values) > 8 * min(values) > 0
    series = [_series(name, own[name], colour) for colour, name in enumerate(errors)]
    found = [
        line(
            f"Error over training, {pool.name}",
            series,
            x_label,
            "error (log scale)" if log else "error",
            about=(
                "A loop is one pass and an evaluation of the joint fit another; loops begin with the seeds at pass 0, "
                "the joint fit with its first evaluation."
            ),
            y_range=span(values, log=log),
            log=log,
            marks=marks,
        )
    ]
    for name, title, y_label in (
        ("temperature", "Temperature over training", "temperature T"),
        ("support", "Support over training", "median support (atoms)"),
    ):
        if own[name]:
            y_range = span([y for one in courses for _, y in one[name]])
            one_line = [_series(name, own[name], 0)]
            found.append(line(f"{title}, {pool.name}", one_line, x_label, y_label, y_range=y_range, marks=marks))
    return found


def _series(name: str, points: Sequence[tuple[float, float]], colour: int) -> Series:
    return Series(name, [x for x, _ in points], [y for _, y in points], colour)
