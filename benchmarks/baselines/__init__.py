"""Other ways to store experts in the same bytes, each in a file, with one signature: fit(task) -> Approximation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import d2, mobe, shared, svd
from .task import Approximation, Layer, Task

__all__ = ["METHODS", "TIMED", "Approximation", "Layer", "Task"]

METHODS: dict[str, Callable[[Task], Approximation]] = {
    "svd": svd.fit,
    "shared": shared.fit,
    "d2": d2.fit,
    "mobe-silu": partial(mobe.fit, activation="silu"),
    "mobe-tanh": partial(mobe.fit, activation="tanh"),
    "mobe-none": partial(mobe.fit, activation="none"),
}
TIMED = frozenset(name for name in METHODS if name.startswith("mobe"))  # trained for as long as they are given
