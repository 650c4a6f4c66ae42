"""Sizes and spans of time as people write them."""

from __future__ import annotations

import re

from globe.errors import UsageError

_SPAN = re.compile(
    r"\s*(?=[\d.])(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s?)?\s*"
)


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it: 6GiB, 500 MB, 6G (1024³), 123456.

    Raises
    ------
    UsageError
        If it is not a size.

    Examples
    --------
    >>> parse_bytes("6GiB") == parse_bytes("6G") == 6 * 2**30
    True
    >>> parse_bytes("500 MB")
    500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)(B?)\s*", text)
    if match is None:
        raise UsageError(f"max_memory is {text!r}; expected bytes or a size such as 6GiB")
    number, prefix, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))


def parse_seconds(text: str) -> float:
    """Seconds of a span of time as people write it: 90s, 40m, 2h, 1h30m, 5400.

    Raises
    ------
    UsageError
        If it is not a span of time.

    Examples
    --------
    >>> parse_seconds("90s"), parse_seconds("40m"), parse_seconds("1h30m")
    (90.0, 2400.0, 5400.0)
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise UsageError(f"time_limit is {text!r}; expected seconds or a time such as 90s, 40m, 2h or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def seconds_text(seconds: float) -> str:
    """A span of time in words, to two units.

    Examples
    --------
    >>> seconds_text(52.4), seconds_text(3120), seconds_text(6700)
    ('52 s', '52 min', '1 h 52 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
