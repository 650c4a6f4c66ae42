"""How many directions of an expert's own second moment there is room for."""

from __future__ import annotations

_MOST = 64
_LEAST = 8  # below, they are not worth their sums
_BYTES = 1 << 30  # of a file, as for moments of the experts' rows


def own_directions(experts: int, width: int) -> int:
    """Directions k of so many experts with inputs of a width d: U is N × d × k; 0 where there is no room."""
    kept = min(_MOST, width, _BYTES // (4 * experts * width))
    return kept if kept >= min(_LEAST, width) else 0
