"""The dtypes of matrices, and how the native kernels take them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from globe.kernels.arguments import plain

NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def kind_of(dtype: DTypeLike | None, default: Any) -> np.dtype[Any]:
    """The dtype of a result.

    Raises
    ------
    ValueError
        If it is none of `NAMES`.
    """
    try:
        kind = np.dtype(default if dtype is None else dtype)
    except TypeError as error:
        raise ValueError(f"dtype: found {dtype!r}; expected a dtype ({error})") from None
    if kind not in NAMES:
        raise ValueError(f"dtype: found {kind}; expected float32, float16 or ml_dtypes.bfloat16")
    return kind


def contiguous(argument: str, value: Any) -> NDArray[Any]:
    """View an array as a plain one of a dtype in `NAMES`, in C order.

    Raises
    ------
    ValueError
        If it is not.
    """
    array = plain(argument, value)
    if array.dtype not in NAMES:
        raise ValueError(
            f"{argument}: found {array.dtype}; expected float32, float16 or ml_dtypes.bfloat16; convert first"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{argument}: found a strided array; expected C order; pass numpy.ascontiguousarray(...)")
    return array


def matrix(argument: str, value: Any) -> NDArray[Any]:
    """The same, of two axes."""
    array = contiguous(argument, value)
    if array.ndim != 2:
        raise ValueError(f"{argument}: found shape {array.shape}; expected a matrix")
    return array


def storage(array: NDArray[Any]) -> NDArray[Any]:
    """16-bit types as their bits: NumPy's buffer protocol cannot name bfloat16."""
    return array if array.dtype == np.float32 else array.view(np.uint16)
