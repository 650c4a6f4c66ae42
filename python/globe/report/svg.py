"""Marks, scales and numbers of the report's charts: strings that are well-formed XML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_SHAPES = {"circle", "line", "path", "rect"}  # HTML lets no other element close itself


def escape(text: object) -> str:
    """Text for a page or an attribute; what XML has no place for becomes �."""
    return html.escape(_UNREADABLE.sub("�", str(text)), quote=True)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element with content that is markup already; `class_` is class, and `stroke_width` is stroke-width."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}/>" if name in _SHAPES and not content else f"<{name}{said}>{content}</{name}>"


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(value)


def text(x: float, y: float, content: object, anchor: str = "middle", **attributes: object) -> str:
    """A label; its anchor is start, middle or end."""
    return tag("text", escape(content), x=float(x), y=float(y), text_anchor=anchor, **attributes)


def tip(content: object) -> str:
    """What a browser shows where the pointer rests."""
    return tag("title", escape(content))


def number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent where it can be read without one."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{places}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def percent(value: float) -> str:
    """A share as a percentage to three significant digits."""
    return f"{number(100 * value, 3)} %"


def size(nbytes: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{number(nbytes / scale, 3)} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Wall time, for reading."""
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if seconds >= 3600 else f"{minutes} min {seconds % 60:.0f} s"


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round values within [low, high], at most `most`, a step of 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers alone where these are too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [
            factor * 10.0**exponent
            for exponent in exponents
            for factor in factors
            if low * (1 - 1e-9) <= factor * 10.0**exponent <= high * (1 + 1e-9)
        ]
        if len(found) <= most:
            break
    return found[:: max(1, math.ceil(len(found) / most))]


@dataclass(frozen=True)
class Frame:
    """A plot's area within its drawing, and the limits of its axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    width: float = 420
    height: float = 250
    left: float = 54
    right: float = 14
    top: float = 10
    bottom: float = 44

    def across(self, value: float) -> float:
        """Where a value of x lies."""
        low, high = self.x
        return self.left + (value - low) / (high - low or 1) * (self.width - self.left - self.right)

    def up(self, value: float) -> float:
        """Where a value of y lies."""
        low, high = self.y
        if self.log:
            low, high, value = (math.log10(max(one, 1e-300)) for one in (low, high, value))
        share = (value - low) / (high - low or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def axes(
        self,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[float] | None = None,
        y_format: Callable[[float], str] = number,
    ) -> str:
        """Grid lines, tick labels and the titles of both axes."""
        base, parts = self.height - self.bottom, []
        for value in log_ticks(*self.y) if self.log else ticks(*self.y):
            y = self.up(value)
            parts.append(tag("line", class_="grid", x1=self.left, x2=self.width - self.right, y1=y, y2=y))
            parts.append(text(self.left - 6, y + 4, y_format(value), "end"))
        for value in ticks(*self.x, most=8, whole=True) if x_ticks is None else x_ticks:
            x = self.across(value)
            parts.append(tag("line", class_="axis", x1=x, x2=x, y1=base, y2=base + 4))
            parts.append(text(x, base + 17, number(value)))
        parts.append(tag("line", class_="axis", x1=self.left, x2=self.width - self.right, y1=base, y2=base))
        parts.append(text((self.left + self.width - self.right) / 2, self.height - 8, x_label, class_="label"))
        middle = (self.top + base) / 2
        parts.append(text(13, middle, y_label, class_="label", transform=f"rotate(-90 13 {middle:.1f})"))
        return "".join(parts)
