"""Codes of given targets, and their supports (specification, G)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from globe import kernels

Array = NDArray[np.float64]


def initial_codes(gram: Array, correlations: Array, kind: str) -> Array:
    """NNLS codes of the proxies, argmin_{α ≥ 0} ‖x_i − Σ_j α_ij B_j‖², for `kind` simplex divided by their sum.

    The left factor absorbs a factor of α_i, so the scale of the target is free, and the division is the
    projection on the simplex for the scale of x_i that suits it best.
    """
    codes = never_empty(kernels.nnls(gram, correlations).codes, correlations)
    return codes / codes.sum(1, keepdims=True) if kind == "simplex" else codes


def supports(codes: Array) -> NDArray[np.int64]:
    """|supp(α_i)| of every expert."""
    counts: NDArray[np.int64] = np.count_nonzero(codes, axis=1)
    return counts


def never_empty(codes: Array, correlations: Array) -> Array:
    """Give an expert whose correlations are all negative its most (anti-)correlated atom: A_i absorbs the sign."""
    codes = np.array(codes, dtype=np.float64)
    empty = np.flatnonzero(codes.max(1) <= 0)
    best = np.abs(correlations[empty]).argmax(1)
    strength = np.abs(correlations[empty, best])
    codes[empty, best] = np.where(strength > 0, strength, 1.0)
    return codes
