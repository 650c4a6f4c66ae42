"""Which p × p moments of the experts' rows a calibration file holds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from globe.checkpoint.family import Family
from globe.errors import UsageError
from globe.statistics.calibration import MOMENTS

RowMoments = Literal["auto", "diagonal", "hidden", "full"]

_KEPT: dict[str, tuple[str, ...]] = {"diagonal": (), "hidden": ("hidden_moment",), "full": MOMENTS}
_AUTO_BYTES = 1 << 30


def kept_moments(choice: str, gates: Family) -> tuple[str, ...]:
    """The moments of a choice of `RowMoments`; ``auto`` is ``hidden`` where that takes less than 1 GiB.

    Raises
    ------
    UsageError
        If it is none.
    """
    if choice == "auto":
        choice = "hidden" if 4 * len(gates) * gates.p**2 < _AUTO_BYTES else "diagonal"
    if choice not in _KEPT:
        raise UsageError(f"row moments is {choice!r}; expected one of auto, {', '.join(_KEPT)}")
    return _KEPT[choice]


def moments_for(families: Collection[str], gates: Family) -> tuple[str, ...]:
    """The moments that the metric of these families reads: those of down's inputs, where they are not too large."""
    return kept_moments("auto" if "down" in families else "diagonal", gates)
