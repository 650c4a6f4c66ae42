"""What to calibrate on: texts and their weights, and how many tokens each gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from globe.errors import UsageError
from globe.statistics.python_texts import PARTS

if TYPE_CHECKING:
    from globe.settings import Settings

PYDOC, SELF, AUTO = "pydoc", "self", "auto"
MEASURED = (AUTO, SELF, PYDOC)  # choices of the setting `calibrate` that are measured, not read
FEWEST, A_DIMENSION, MOST = 32_768, 64, 131_072  # tokens: at least, for each of d inputs, at most if nobody asks

Given = Mapping[str, float]


@dataclass(frozen=True)
class Text:
    """A text to calibrate on.

    Parameters
    ----------
    name : str
        ``self``; ``pydoc:`` and a part of `PARTS`; the path of a file or folder; or what a given text is called.
    share : float
        Of all tokens, where there are as many.
    group : str
        What it was asked for as: the parts of ``pydoc`` make up for each other first.
    content : str, optional
        The text itself, where it was given.
    """

    name: str
    share: float
    group: str
    content: str | None = None


def mixture(given: Given) -> tuple[Text, ...]:
    """The texts of names with their weights.

    Parameters
    ----------
    given : mapping of str to float
        Names: ``auto`` (pydoc and self in equal shares), ``pydoc`` (three parts in equal shares), ``self``, a part as
        ``pydoc:topics``, or the path of a file or folder.

    Raises
    ------
    UsageError
        If a weight is not above zero, or there is none.
    """
    weights: dict[str, float] = {}
    for name, weight in given.items():
        if not 0 < weight < float("inf"):
            raise UsageError(f"text {name}: weight is {weight:g}; expected a number above 0")
        for part in (PYDOC, SELF) if name == AUTO else (name,):
            weights[part] = weights.get(part, 0.0) + (weight / 2 if name == AUTO else weight)
    total = sum(weights.values())
    if total == 0:
        raise UsageError("no text is named; expected a file, a folder, pydoc or self")
    found = []
    for name, weight in weights.items():
        parts = [f"{PYDOC}:{part}" for part in PARTS] if name == PYDOC else [name]
        found += [Text(part, weight / total / len(parts), name) for part in parts]
    return tuple(found)


def parse_texts(words: Iterable[str]) -> dict[str, float]:
    """Names and weights of words such as ``notes.txt`` or ``pydoc=2``; a weight that is not stated is 1.

    Raises
    ------
    UsageError
        If a name is given twice.
    """
    found: dict[str, float] = {}
    for word in words:
        name, sign, number = word.rpartition("=")
        weight = 1.0
        if sign and name and not Path(word).exists():
            try:
                weight = float(number)
            except ValueError:
                name = word
        else:
            name = word
        if name in found:
            raise UsageError(f"text {name} is given twice; give it once, with a weight ({name}=2)")
        found[name] = weight
    return found


def usual_tokens(d: int) -> int:
    """The tokens of a calibration of a model of width d: 64 d, but from 32,768 to 131,072.

    >>> usual_tokens(512), usual_tokens(576), usual_tokens(7168)
    (32768, 36864, 131072)
    """
    return max(FEWEST, min(A_DIMENSION * d, MOST))


def tokens_for(settings: Settings, d: int) -> int:
    """The setting `calibration_tokens`, or what is usual for the model's width."""
    return settings.calibration_tokens if settings.calibration_tokens is not None else usual_tokens(d)


def deal(wanted: int, shares: Sequence[float], there: Sequence[int]) -> list[int]:
    """Deal `wanted` things by shares; what a source has not got, the others make up for, by their shares.

    >>> deal(9, [1, 1, 1], [100, 2, 100]), deal(4, [1, 1, 1], [9, 9, 9]), deal(9, [1, 1], [2, 3])
    ([4, 2, 3], [2, 1, 1], [2, 3])
    """
    given = [0] * len(shares)
    for _ in range(min(wanted, sum(there))):
        open_ones = [place for place in range(len(shares)) if given[place] < there[place]]
        given[min(open_ones, key=lambda place: ((given[place] + 1) / shares[place], place))] += 1
    return given
