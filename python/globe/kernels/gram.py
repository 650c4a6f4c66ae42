"""Gram matrices of long vectors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))


def gram(vectors: NDArray[Any], *, weights: ArrayLike | None = None, block: int = 4096) -> NDArray[np.float64]:
    """Compute the inner products ``G = X diag(w) Xᵀ`` of the rows of X.

    Parameters
    ----------
    vectors : ndarray, shape (n, k)
        X in float32, float16, ``ml_dtypes.bfloat16`` or float64. Read in blocks of columns, so it may
        be a memory map.
    weights : array_like, shape (k,), optional
        Non-negative weight of each column; all 1 by default.
    block : int
        Columns per block. Products are summed in float32 (float64 for float64 vectors) inside a block
        and in float64 across blocks.

    Returns
    -------
    ndarray of float64, shape (n, n)
        Exactly symmetric.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.
    """
    vectors = np.asanyarray(vectors)  # a memory map stays one
    if vectors.ndim != 2:
        raise ValueError(f"vectors: found shape {vectors.shape}; expected (n, k); flatten each vector into a row")
    if vectors.dtype not in _DTYPES:
        raise ValueError(
            f"vectors: found {vectors.dtype}; expected float32, float16, bfloat16 or float64; convert with astype"
        )
    if block < 1:
        raise ValueError(f"block: found {block}; expected at least 1; 4096 is a good choice")
    n, k = vectors.shape
    working = np.float64 if vectors.dtype == np.float64 else np.float32
    roots = None if weights is None else _roots(weights, k)

    total = np.zeros((n, n))
    for start in range(0, k, block):
        part: NDArray[Any] = vectors[:, start : start + block].astype(working)
        if roots is not None:
            part = part * roots[start : start + block].astype(working)
        total += part @ part.T  # NumPy calls SYRK for a product with its own transpose
    upper = np.triu_indices(n, 1)
    total.T[upper] = total[upper]
    return total


def _roots(weights: ArrayLike, k: int) -> NDArray[np.float64]:
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (k,):
        raise ValueError(f"weights: found shape {array.shape}; expected ({k},), one weight per column of vectors")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError("weights: found a negative or non-finite weight; expected finite weights of at least 0")
    return np.sqrt(array)
