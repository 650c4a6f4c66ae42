"""Gram matrices as NumPy products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 4096


def add(vectors: NDArray[Any], total: NDArray[np.float64], weights: NDArray[np.float64] | None, threads: int) -> None:
    """total += X diag(w) Xᵀ, block of columns by block of columns."""
    working = np.float64 if vectors.dtype == np.float64 else np.float32
    for start in range(0, vectors.shape[1], _BLOCK):
        part: NDArray[Any] = vectors[:, start : start + _BLOCK].astype(working)
        if weights is not None:
            part = part * np.sqrt(weights[start : start + _BLOCK]).astype(working)
        total += part @ part.T  # NumPy calls SYRK for a product with its own transpose
