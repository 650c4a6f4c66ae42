"""Other ways to store experts, each in a file, with one signature: fit(task) -> Approximation.

Those of `METHODS` keep factors and fill a budget; those of `ROUNDINGS` keep whole experts, and bits say what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import d2, dense, mobe, shared, svd
from .grid import Bits
from .task import Approximation, Layer, Task

__all__ = ["METHODS", "ROUNDED", "ROUNDINGS", "TIMED", "Approximation", "Bits", "Layer", "Task"]

METHODS: dict[str, Callable[[Task], Approximation]] = {
    "svd": svd.fit,
    "shared": shared.fit,
    "d2": d2.fit,
    "mobe-silu": partial(mobe.fit, activation="silu"),
    "mobe-tanh": partial(mobe.fit, activation="tanh"),
    "mobe-none": partial(mobe.fit, activation="none"),
}
ROUNDINGS = {name: partial(dense.fit, rounding=rounding) for name, rounding in dense.ROUNDINGS.items()}
TIMED = frozenset(name for name in METHODS if name.startswith("mobe"))  # trained for as long as they are given
ROUNDED = frozenset(METHODS) - {"d2"}  # whose factors may have fewer bits
