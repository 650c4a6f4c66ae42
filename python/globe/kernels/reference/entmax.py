"""Sparse probabilities by sorting, and by bisection where there is no closed form. Everything is float64.

Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019;
Martins and Astudillo, "From softmax to sparsemax", ICML 2016 (alpha = 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STEPS = 100


def entmax(z: NDArray[Any], out: NDArray[Any], alpha: float, temperature: float, epsilon: float, threads: int) -> int:
    """Fill out with probabilities. Returns the first row that holds NaN or has no finite maximum, or len(z)."""
    logits = z.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(top))  # max passes NaN on
    if bad.size:
        return int(bad[0])
    limits = np.finfo(np.float64)
    with np.errstate(over="ignore"):
        logits = (logits - top) * np.clip((alpha - 1.0) / temperature, limits.tiny, limits.max)
    logits = np.maximum(logits, -2.0)  # probabilities are 0 from -1 on
    if alpha == 2.0:
        p = np.maximum(logits - _threshold_2(logits), 0.0)
    elif alpha == 1.5:
        p = np.square(np.maximum(logits - _threshold_15(logits), 0.0))
    else:
        power = 1.0 / (alpha - 1.0)
        p = _power(logits - _threshold(logits, power), power)
    p /= p.sum(axis=1, keepdims=True)
    if epsilon > 0.0:
        p[p < np.minimum(epsilon, p.max(axis=1, keepdims=True))] = 0.0
        p /= p.sum(axis=1, keepdims=True)
    out[...] = p
    return len(z)


def entmax_backward(
    y: NDArray[Any], dy: NDArray[Any], out: NDArray[Any], alpha: float, temperature: float, threads: int
) -> None:
    """Fill out with ``s ⊙ (dy − ⟨s, dy⟩ / Σ s) / T``, where ``s = y^(2−α)`` on the support and 0 elsewhere."""
    support = y > 0.0
    s = np.power(y, 2.0 - alpha, out=np.zeros(y.shape), where=support)
    on_support = np.where(support, dy, 0.0)
    total = s.sum(axis=1, keepdims=True)
    mean = np.divide((s * on_support).sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0.0)
    out[...] = np.where(support, s * (on_support - mean) / temperature, 0.0)


def _threshold_2(z: Floats) -> Floats:
    """Find τ with Σ max(z − τ, 0) = 1 (Martins and Astudillo, algorithm 1)."""
    descending = -np.sort(-z, axis=1)
    rank = np.arange(1, z.shape[1] + 1)
    tau = (np.cumsum(descending, axis=1) - 1.0) / rank
    size = (descending > tau).sum(axis=1, keepdims=True)
    return np.take_along_axis(tau, size - 1, axis=1)


def _threshold_15(z: Floats) -> Floats:
    """Find τ with Σ max(z − τ, 0)² = 1 (Peters et al., algorithm 2)."""
    descending = -np.sort(-z, axis=1)
    rank = np.arange(1, z.shape[1] + 1)
    mean = np.cumsum(descending, axis=1) / rank
    scatter = np.cumsum(np.square(descending), axis=1) - rank * np.square(mean)
    tau = mean - np.sqrt(np.maximum((1.0 - scatter) / rank, 0.0))
    size = (tau <= descending).sum(axis=1, keepdims=True)
    return np.take_along_axis(tau, size - 1, axis=1)


def _threshold(z: Floats, power: float) -> Floats:
    """Find τ + 1 with Σ max(z − τ, 0)^power = 1; z has maximum 0.

    Bisection on [0, 1 − d^(−1/power)], with a Newton step wherever that stays inside the bracket. τ + 1 and not
    τ, because it is small for alpha close to 1.
    """
    low = np.zeros((len(z), 1))
    high = np.full_like(low, -np.expm1(-np.log(z.shape[1]) / power))
    shift = low
    for _ in range(_STEPS):
        slope = _power(z - shift, power - 1.0)
        excess = (slope * np.maximum(z - shift + 1.0, 0.0)).sum(axis=1, keepdims=True) - 1.0
        low = np.where(excess >= 0.0, shift, low)
        high = np.where(excess >= 0.0, high, shift)
        done = np.abs(excess) <= 1e-14
        if done.all():
            break
        newton = shift + excess / (power * np.maximum(slope.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny))
        shift = np.where(done, shift, np.where((newton > low) & (newton < high), newton, 0.5 * (low + high)))
    return shift


def _power(less: Floats, power: float) -> Floats:
    """max(1 + less, 0)^power, exact also for a large power and a number close to 1."""
    with np.errstate(divide="ignore"):
        return np.where(less > -1.0, np.exp(power * np.log1p(np.maximum(less, -1.0))), 0.0)
