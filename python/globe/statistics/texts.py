"""Texts to measure a model on."""

from __future__ import annotations

import platform
from pathlib import Path

from globe.errors import GlobeError, UsageError


def evaluation_text(half: str) -> str:
    """Return one half of a technical English text that every Python installation carries.

    The text is the language reference in ``pydoc_data.topics``; it changes a little between Python releases, so
    figures are comparable only under the same one.

    Parameters
    ----------
    half : str
        ``"calibration"`` or ``"evaluation"``: the first or the second half, by characters.

    Returns
    -------
    str
    """
    from pydoc_data.topics import topics

    if half not in ("calibration", "evaluation"):
        raise UsageError(f'half must be "calibration" or "evaluation", not {half!r}')
    text = "\n\n".join(topics[key] for key in sorted(topics))
    middle = len(text) // 2
    return text[:middle] if half == "calibration" else text[middle:]


def read_text(text: str | Path | None, half: str = "evaluation") -> tuple[str, str]:
    """Return a text and its name.

    Parameters
    ----------
    text : str, Path or None
        A `Path` is a UTF-8 file to read, a `str` the text itself, None a half of `evaluation_text`.
    half : str
        Which half None stands for.

    Returns
    -------
    tuple of str
    """
    if text is None:
        return evaluation_text(half), f"pydoc_data.topics of Python {platform.python_version()}, {half} half"
    if isinstance(text, str):
        return text, "given text"
    try:
        return text.read_text(encoding="utf-8"), str(text)
    except OSError as error:
        raise UsageError(f"{text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise GlobeError(f"{text}: not UTF-8 text (byte {error.start})") from error
