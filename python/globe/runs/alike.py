"""Ranks do one thing: what each was given and what it sees are compared before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from globe.compute import ranks
from globe.errors import GlobeError, UsageError
from globe.runs.store import differences


def require_alike(given: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """Refuse a rank that was given, or sees, something else than rank 0; all ranks call it at the same place.

    Parameters
    ----------
    given, seen : mapping of str to Any
        What the command says, and what was found: plain values of JSON.

    Raises
    ------
    UsageError
        If one was given something else.
    GlobeError
        If one sees something else.
    """
    for number, (asked, found) in enumerate(told := ranks.gathered((given, seen))):
        different = differences(asked, told[0][0])
        kind = UsageError if different else GlobeError
        different += differences(found, told[0][1])
        if different:
            raise kind(f"rank {number} is not as rank 0: {', '.join(different[:3])}; start all with the same command")
