"""The kinds of chart of the report: lines, bars, horizontal bars, heat map; each is a figure with an inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from globe.report.svg import Frame, escape, number, tag, text, tip

Array = NDArray[np.float64]

LEVELS = 9
_MOST_TIPS = 4000


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, its points, which colour, and whether it is broken."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


def figure(title: str, about: str, drawing: str, width: float, height: float, legend: str = "") -> str:
    """A titled drawing that shrinks to 0.82 of its natural width before it scrolls, and grows to 1.25 of it."""
    svg = tag("svg", tip(title) + drawing, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=title)
    said = tag("figcaption", tag("b", escape(title)) + (tag("span", escape(about)) if about else ""))
    style = f"min-width:{0.82 * width:.0f}px;max-width:{1.25 * width:.0f}px"
    key = tag("div", legend, class_="legend") if legend else ""
    return tag("figure", said + key + tag("div", tag("div", svg, style=style), class_="plot"))


def line(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    about: str = "",
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    y_format: Callable[[float], str] = number,
) -> str:
    """Lines over numbers; `marks` are labelled vertical lines. y begins at 0 unless it is logarithmic."""
    series = [one for one in series if len(one.xs)]
    if not series:
        return figure(title, about, text(210, 40, "nothing to show"), 420, 80)
    xs = [x for one in series for x in one.xs]
    low, high = y_range if y_range is not None else span([y for one in series for y in one.ys], log=log)
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = Frame(x_range, (low, high), log)
    parts = [frame.axes(x_label, y_label, y_format=y_format)]
    for x, label in marks:
        where = frame.across(x)
        parts.append(tag("line", class_="mark", x1=where, x2=where, y1=frame.top, y2=frame.height - frame.bottom))
        parts.append(text(where + 4, frame.top + 9, label, "start", class_="remark"))
    dots = len(xs) <= 400
    for one in series:
        finite = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(y)]
        points = [(frame.across(x), frame.up(y)) for x, y in finite]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else "M0 0"
        parts.append(tag("path", class_=f"line s{one.colour % 6}{' dashed' if one.dashed else ''}", d=path))
        if dots:
            for (x, y), (at, value) in zip(points, finite, strict=True):
                said = tip(f"{one.name}: {y_format(value)} at {x_label} {number(at)}")
                parts.append(tag("circle", said, class_=f"dot s{one.colour % 6}", cx=x, cy=y, r=2.4))
    keys = [
        tag("span", tag("i", " ", class_=f"key s{one.colour % 6}{' dashed' if one.dashed else ''}") + escape(one.name))
        for one in series
    ]
    return figure(title, about, "".join(parts), frame.width, frame.height, "".join(keys))


def span(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Limits of an axis for values: from 0, or where it is logarithmic from the next 1, 2 or 5 below, and some room."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not found:
        return (0.1, 1.0) if log else (0.0, 1.0)
    if log:
        low, high = min(found), max(found)
        down, up = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        low = max(factor * down for factor in (1, 2, 5) if factor * down <= low * (1 + 1e-9))
        high = min(factor * up / 10 for factor in (1, 2, 5, 10) if factor * up / 10 >= high * (1 - 1e-9))
        return (low, high) if high > low else (low / 2, high * 2)
    return min(0.0, *found), max(1.06 * max(found), 1e-12)


def bars(
    title: str,
    values: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    first: int = 0,
    about: str = "",
    top: float | None = None,
    tips: Sequence[str] | None = None,
    mark: tuple[float, str] | None = None,
) -> str:
    """Upright bars at first, first + 1, …; `mark` is a labelled vertical line."""
    frame = Frame((first - 0.5, first + max(1, len(values)) - 0.5), (0, span([top or 0, *values])[1]))
    parts = [frame.axes(x_label, y_label)]
    wide = frame.across(1) - frame.across(0)
    for place, value in enumerate(values):
        if value <= 0:
            continue
        y, said = frame.up(value), tips[place] if tips is not None else f"{x_label} {first + place}: {number(value)}"
        x, thick = frame.across(first + place) - 0.44 * wide, 0.88 * wide
        tall = frame.up(0) - y
        parts.append(tag("rect", tip(said), class_="bar s0", x=x, y=y, width=thick, height=tall))
    if mark is not None and frame.x[0] <= mark[0] <= frame.x[1]:
        x = frame.across(mark[0])
        parts.append(tag("line", class_="mark", x1=x, x2=x, y1=frame.top, y2=frame.height - frame.bottom))
        near = x > frame.width - 90
        parts.append(
            text(x - 4 if near else x + 4, frame.top + 9, mark[1], "end" if near else "start", class_="remark")
        )
    return figure(title, about, "".join(parts), frame.width, frame.height)


def levels(
    title: str,
    rows: Sequence[tuple[str, float, str]],
    *,
    about: str = "",
    top: float | None = None,
    format_: Callable[[float], str] = number,
) -> str:
    """Horizontal bars, one a row: its label, its value, and what is said where the pointer rests."""
    highest = max([top or 0, *(value for _, value, _ in rows), 1e-12])
    left, width, step = 112.0, 420.0, 20.0
    room = width - left - 78
    parts = []
    for place, (label, value, said) in enumerate(rows):
        y = 4 + place * step
        parts.append(text(left - 6, y + 13, _short(label, 17), "end"))
        long = max(1.0, value / highest * room)
        parts.append(tag("rect", tip(said), class_="bar s0", x=left, y=y + 2, width=long, height=step - 6))
        parts.append(text(left + long + 5, y + 13, format_(value), "start"))
    return figure(title, about, "".join(parts), width, 8 + step * max(1, len(rows)))


def heat_map(
    title: str,
    values: Array,
    rows: Sequence[int],
    columns: Sequence[int],
    row_label: str,
    column_label: str,
    edges: Sequence[float],
    *,
    about: str = "",
    scale: Sequence[str] | None = None,
    format_: Callable[[float], str] = number,
    tips: Callable[[int, int], str] | None = None,
) -> str:
    """A matrix as coloured cells: colour k where `edges` has k values that are no higher, none where it has NaN.

    Cells of one colour are one path; up to 4000 cells have a tip each. `scale` names the colours in the legend.
    """
    count, across = values.shape
    wide = min(22.0, max(5.0, 348 / max(across, 1)))
    tall = min(16.0, max(2.0, 420 / max(count, 1)))
    left, top, bottom = 46.0, 4.0, 42.0
    width, height = max(left + wide * across + 10, 220.0), top + tall * count + bottom
    shades = np.searchsorted(np.asarray(edges), values, side="right")
    parts = [tag("rect", class_="empty", x=left, y=top, width=wide * across, height=tall * count)]
    gap = 0.6 if min(wide, tall) >= 6 else 0.0
    for shade in range(len(edges) + 1):
        path = [
            f"M{left + x * wide:.1f} {top + y * tall:.1f}h{wide - gap:.1f}v{tall - gap:.1f}h{gap - wide:.1f}z"
            for y, x in zip(*np.nonzero((shades == shade) & np.isfinite(values)), strict=True)
        ]
        if path:
            parts.append(tag("path", class_=f"q{_colour(shade, len(edges))}", d="".join(path)))
    if values.size <= _MOST_TIPS:
        for y, x in zip(*np.nonzero(np.isfinite(values)), strict=True):
            said = f"{row_label} {rows[y]}, {column_label} {columns[x]}: {format_(float(values[y, x]))}"
            said = tips(int(y), int(x)) if tips is not None else said
            at = {"x": left + x * wide, "y": top + y * tall, "width": wide, "height": tall}
            parts.append(tag("rect", tip(said), class_="cell", **at))
    for place in _thinned(across, wide, 8.0 * max((len(str(one)) for one in columns), default=1) + 4):
        parts.append(text(left + (place + 0.5) * wide, top + tall * count + 14, columns[place]))
    for place in _thinned(count, tall, 13):
        parts.append(text(left - 5, top + (place + 0.5) * tall + 4, rows[place], "end"))
    parts.append(text(left + wide * across / 2, height - 7, column_label, class_="label"))
    middle = top + tall * count / 2
    if tall * count >= 6.5 * len(row_label):
        parts.append(text(12, middle, row_label, class_="label", transform=f"rotate(-90 12 {middle:.1f})"))
        row_note = ""
    else:
        row_note = f"Rows: {row_label}. "
    names = scale if scale is not None else _scale(edges, format_)
    keys = "".join(
        tag("span", tag("i", " ", class_=f"swatch q{_colour(shade, len(edges))}") + escape(names[shade]))
        for shade in range(len(edges) + 1)
        if ((shades == shade) & np.isfinite(values)).any()
    )
    return figure(title, row_note + about, "".join(parts), width, height, keys)


def even_edges(low: float, high: float) -> list[float]:
    """Edges of `LEVELS` equal steps from low to high."""
    return [low + (high - low) * step / LEVELS for step in range(1, LEVELS)] if high > low else []


def _scale(edges: Sequence[float], format_: Callable[[float], str]) -> list[str]:
    if not len(edges):
        return ["all"]
    inner = [f"{format_(low)} – {format_(high)}" for low, high in itertools.pairwise(edges)]
    return [f"< {format_(edges[0])}", *inner, f"≥ {format_(edges[-1])}"]


def _colour(shade: int, edges: int) -> int:
    return round(shade * (LEVELS - 1) / max(1, edges))


def _thinned(count: int, pitch: float, needed: float) -> range:
    step = max(1, math.ceil(needed / pitch))
    nice = next(one for one in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if one >= step)
    return range(0, count, nice)


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
