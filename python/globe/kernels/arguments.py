"""What every kernel asks of its arguments, with errors that name them."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def plain(argument: str, value: Any) -> NDArray[Any]:
    """View the value as an array of real numbers without a class of its own; an array is never copied.

    Memory maps stay mapped. A matrix of numpy.matrix is rows like any other.

    Raises
    ------
    ValueError
        If the value is masked, or no array of real numbers.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{argument}: found a masked array; expected every entry; pass {argument}.filled(...)")
    try:
        found = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument}: found {type(value).__name__}; expected an array of real numbers ({error})"
        ) from None
    if not is_real(found.dtype):
        raise ValueError(f"{argument}: found {found.dtype}; expected an array of real numbers; convert it first")
    return found


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether entries are real numbers: not complex, dates, text, objects or records."""
    return dtype.kind in "biuf" or (dtype.kind == "V" and np.can_cast(dtype, np.float64))  # ml_dtypes are of kind V


def writeable(argument: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View an array to be written to as a plain one.

    Raises
    ------
    ValueError
        If it is not a writeable array in C order of this shape and dtype.
    """
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{argument}: found {type(value).__name__}; expected a plain array of {dtype} {shape}")
    flags = value.flags
    if value.shape != shape or value.dtype != dtype or not (flags.carray and flags.writeable):
        raise ValueError(
            f"{argument}: found {value.dtype} of shape {value.shape}; "
            f"expected a writeable {dtype} {shape} in C order; pass a new array"
        )
    return value.view(np.ndarray)


def number(argument: str, value: Any) -> float:
    """A real number as a float.

    Raises
    ------
    ValueError
        If it is a truth value, no number, or beyond float64.
    """
    try:
        array = np.asarray(value)
        if array.ndim == 0 and (array.dtype.kind in "iuf" or type(value) is int):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{argument}: found {value!r}; expected a real number")


def whole(argument: str, value: Any, most: int, remedy: str = "") -> int:
    """An integer from 1 to `most`.

    Raises
    ------
    ValueError
        If it is a truth value, no integer, or out of this range.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= most:
        raise ValueError(f"{argument}: found {value!r}; expected an integer of at least 1 and at most {most}{remedy}")
    return count
