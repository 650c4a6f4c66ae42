"""Products with weights of few bits."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from globe import _native
from globe.kernels.arguments import plain, writeable
from globe.kernels.backends import check_threads, choose
from globe.kernels.dtypes import NAMES, kind_of, matrix, storage

_LONGEST_GROUP = 256  # sums of 16-bit times 8-bit integers stay below 2³¹


def qmatmul(
    x: NDArray[Any],
    packed: NDArray[np.int32],
    scales: NDArray[Any],
    *,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Multiply with packed weights: ``out = x · Wᵀ``, ``W[i, k] = q[i, k] · scales[i, k // group]``.

    Parameters
    ----------
    x : ndarray, shape (n, r)
        Activations in float32, float16 or ``ml_dtypes.bfloat16``, C-contiguous, a row per token.
    packed : ndarray of int32, shape (p, r / 8) or (p, r / 4)
        The integers q of 4 or of 8 bits, as compressed-tensors' ``pack-quantized`` packs them: consecutive ones of a
        row in a word, the first in the lowest bits, 8 or 128 added to each. Which of the two it is follows from `x`.
    scales : ndarray, shape (p, r / group)
        In float32, float16 or ``ml_dtypes.bfloat16``. The group follows from the shape: a divisor of r, a multiple of
        8 (of 4 with 8 bits), and 256 at most.
    dtype : dtype, optional
        Dtype of the result: float32, float16 or ``ml_dtypes.bfloat16``; that of `x` by default.
    out : ndarray, shape (n, p), optional
        Where to write, C-contiguous, in `dtype`. Must not overlap the arguments.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default.

    Returns
    -------
    ndarray, shape (n, p)
        `x` is rounded to 16 bits: in every group of a token to multiples of 2⁻¹⁴ of the power of two below its largest
        entry (or below 2⁻¹⁰⁰), which leaves bfloat16 within 2⁷ of the largest as they are. Sums over a group are exact,
        sums over groups are in float32, rounded once. A token with NaN or an infinity gives NaN. The bits of a token's
        row depend neither on the number of threads nor on the other tokens.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import qmatmul
    >>> q = np.array([[1, -2, 3, 0, 0, 0, 0, 7]])
    >>> packed = ((q + 8) << 4 * np.arange(8)).sum(1, keepdims=True).astype(np.uint32).view(np.int32)
    >>> qmatmul(np.ones((1, 8), np.float32), packed, np.array([[0.5]], np.float32))
    array([[4.5]], dtype=float32)
    """
    rows, scale = matrix("x", x), matrix("scales", scales)
    words, bits = _words(packed, rows.shape[1])
    _check_groups(scale, words, bits)
    shape = (len(rows), len(words))
    kind = kind_of(dtype, rows.dtype if out is None else getattr(out, "dtype", rows.dtype))
    target = np.empty(shape, kind) if out is None else writeable("out", out, shape, kind)
    if out is not None and any(np.may_share_memory(target, given) for given in (rows, words, scale)):
        raise ValueError("out: found memory shared with an argument; expected separate memory; pass a new array")
    count = check_threads(threads)
    chosen = choose(backend)
    if chosen == "native":
        weights = (words, bits, storage(scale), NAMES[scale.dtype])
        _native.qmatmul(storage(rows), NAMES[rows.dtype], *weights, storage(target), NAMES[kind], count)
    else:
        _implementation(chosen).qmatmul(rows, words, scale, target, count)
    return target if out is None else out


def _words(packed: Any, columns: int) -> tuple[NDArray[np.int32], int]:
    words = plain("packed", packed)
    if words.dtype != np.int32 or words.ndim != 2 or not words.flags.c_contiguous:
        order = "" if words.flags.c_contiguous else ", strided"
        raise ValueError(
            f"packed: found {words.dtype} of shape {words.shape}{order}; expected int32 (p, words) in C order"
        )
    for bits in (4, 8):
        if words.shape[1] * 32 == columns * bits:
            return words, bits
    raise ValueError(
        f"packed: found {words.shape[1]} words a row; expected {columns / 8:g} (4 bits) or {columns / 4:g} (8 bits) "
        f"for the {columns} columns of x"
    )


def _check_groups(scales: NDArray[Any], words: NDArray[np.int32], bits: int) -> None:
    rows, columns, step = len(words), words.shape[1] * 32 // bits, 32 // bits
    if len(scales) != rows:
        raise ValueError(f"scales: found {len(scales)} rows; expected {rows}, as packed has")
    groups = scales.shape[1]
    size = columns // groups if groups else 0
    if columns and (size * groups != columns or size % step or size > _LONGEST_GROUP):
        raise ValueError(
            f"scales: found {groups} groups for {columns} columns; "
            f"expected groups of one size, a multiple of {step} and at most {_LONGEST_GROUP}"
        )


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"globe.kernels.{backend}.qmatmul")
