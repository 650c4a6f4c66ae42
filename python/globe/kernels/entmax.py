"""Sparse probabilities: entmax, its gradient and its inverse.

Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019;
Martins and Astudillo, "From softmax to sparsemax", ICML 2016 (alpha = 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEPS = 60


def entmax(logits: NDArray[Any], alpha: float = 1.5, *, temperature: float = 1.0, epsilon: float = 0.0) -> NDArray[Any]:
    """Map logits to sparse probabilities along the last axis.

    Solves ``argmax_p ⟨p, z/T⟩ + H_α(p)`` over the probability simplex, with Tsallis entropy H_α. The
    solution is ``p = max((α−1) z/T − τ, 0)^(1/(α−1))`` with τ such that p sums to 1.

    Parameters
    ----------
    logits : array_like, shape (..., d)
        float32 and float64 keep their dtype, other real dtypes give float64. −inf gives probability 0.
    alpha : float
        In (1, 2]; 2 is sparsemax. 1.5 and 2 are solved exactly by sorting, others by bisection.
    temperature : float
        T > 0.
    epsilon : float
        In [0, 1): probabilities below it become 0 and the rest is scaled to sum to 1. The largest
        probability is always kept.

    Returns
    -------
    ndarray, shape (..., d)
        Rows sum to 1.

    Raises
    ------
    ValueError
        If a row holds NaN or +inf or only −inf, or an argument is out of range.
    """
    _check(alpha, temperature)
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon: found {epsilon}; expected a number in [0, 1)")
    array = np.asarray(logits)
    dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.dtype(np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"logits: found shape {array.shape}; expected (..., d) with d of at least 1")
    z = array.astype(np.float64)
    top = z.max(axis=-1, keepdims=True, initial=-np.inf)
    if not np.all(np.isfinite(top)):  # max passes NaN on
        raise ValueError(
            "logits: found a row with NaN or +inf, or all −inf; expected at least one finite logit per row"
        )
    # Probabilities are 0 from one unit below the maximum on, so cutting at two changes nothing.
    z = np.maximum((z - top) * ((alpha - 1.0) / temperature), -2.0)

    if alpha == 2.0:
        p = np.maximum(z - _threshold_2(z), 0.0)
    elif alpha == 1.5:
        p = np.square(np.maximum(z - _threshold_15(z), 0.0))
    else:
        power = 1.0 / (alpha - 1.0)
        p = np.maximum(z - _threshold_bisect(z, power), 0.0) ** power
    p /= p.sum(axis=-1, keepdims=True)
    if epsilon > 0.0:
        p[p < np.minimum(epsilon, p.max(axis=-1, keepdims=True))] = 0.0
        p /= p.sum(axis=-1, keepdims=True)
    result: NDArray[Any] = p.astype(dtype, copy=False)
    return result


def entmax_backward(
    probabilities: NDArray[Any], gradient: NDArray[Any], alpha: float = 1.5, *, temperature: float = 1.0
) -> NDArray[Any]:
    """Pull a gradient back through :func:`entmax`.

    With ``s = y^(2−α)`` on the support of y and 0 elsewhere, ``dz = s ⊙ (dy − ⟨s, dy⟩ / Σ s) / T``.

    Parameters
    ----------
    probabilities : array_like, shape (..., d)
        Output y of :func:`entmax`.
    gradient : array_like, shape (..., d)
        Derivative dy of a scalar with respect to y.
    alpha, temperature : float
        As given to :func:`entmax`.

    Returns
    -------
    ndarray, shape (..., d)
        Derivative with respect to the logits.

    Raises
    ------
    ValueError
        If shapes differ or an argument is out of range.
    """
    _check(alpha, temperature)
    y, dy = np.asarray(probabilities), np.asarray(gradient)
    if y.shape != dy.shape or y.ndim == 0:
        raise ValueError(f"gradient: found shape {dy.shape}; expected {y.shape}, the shape of probabilities")
    dtype = y.dtype if y.dtype in (np.float32, np.float64) else np.dtype(np.float64)
    y64 = y.astype(np.float64)
    s = np.power(y64, 2.0 - alpha, out=np.zeros_like(y64), where=y64 > 0.0)
    on_support = np.where(s > 0.0, dy, 0.0)
    mean = (s * on_support).sum(axis=-1, keepdims=True) / s.sum(axis=-1, keepdims=True)
    result: NDArray[Any] = (s * (on_support - mean) / temperature).astype(dtype)
    return result


def entmax_inverse(probabilities: NDArray[Any], alpha: float = 1.5, *, temperature: float = 1.0) -> NDArray[Any]:
    """Find logits that :func:`entmax` maps to given probabilities.

    ``z = T p^(α−1) / (α−1)`` on the support and 0 elsewhere: the solution with threshold τ = 0. Any
    smaller logit off the support gives the same probabilities.

    Parameters
    ----------
    probabilities : array_like, shape (..., d)
        Non-negative rows that sum to 1.
    alpha, temperature : float
        As later given to :func:`entmax`.

    Returns
    -------
    ndarray, shape (..., d)
        z with ``entmax(z, alpha, temperature=temperature) = probabilities``.

    Raises
    ------
    ValueError
        If a row is not a probability vector or an argument is out of range.
    """
    _check(alpha, temperature)
    p = np.asarray(probabilities)
    dtype = p.dtype if p.dtype in (np.float32, np.float64) else np.dtype(np.float64)
    p64 = p.astype(np.float64)
    if p64.ndim == 0 or not np.all(p64 >= 0.0) or not np.allclose(p64.sum(axis=-1), 1.0, rtol=0.0, atol=1e-3):
        raise ValueError("probabilities: expected non-negative rows that sum to 1; divide each row by its sum")
    z: NDArray[Any] = (temperature * p64 ** (alpha - 1.0) / (alpha - 1.0)).astype(dtype)
    return z


def _check(alpha: float, temperature: float) -> None:
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"alpha: found {alpha}; expected a number in (1, 2]; 1.5 is the usual choice")
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature: found {temperature}; expected a finite number above 0")


def _threshold_2(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find τ with Σ max(z − τ, 0) = 1 (Martins and Astudillo, algorithm 1)."""
    descending = -np.sort(-z, axis=-1)
    rank = np.arange(1, z.shape[-1] + 1)
    tau = (np.cumsum(descending, axis=-1) - 1.0) / rank
    size = (descending > tau).sum(axis=-1, keepdims=True)
    return np.take_along_axis(tau, size - 1, axis=-1)


def _threshold_15(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find τ with Σ max(z − τ, 0)² = 1 (Peters et al., algorithm 2)."""
    descending = -np.sort(-z, axis=-1)
    rank = np.arange(1, z.shape[-1] + 1)
    mean = np.cumsum(descending, axis=-1) / rank
    scatter = np.cumsum(np.square(descending), axis=-1) - rank * np.square(mean)
    tau = mean - np.sqrt(np.maximum((1.0 - scatter) / rank, 0.0))
    size = (tau <= descending).sum(axis=-1, keepdims=True)
    return np.take_along_axis(tau, size - 1, axis=-1)


def _threshold_bisect(z: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Find τ with Σ max(z − τ, 0)^power = 1; z has maximum 0.

    Bisection on [−1, −d^(−1/power)], with a Newton step wherever that stays inside the bracket. Only
    logits above −1 can have a share, so only the largest few are looked at.
    """
    size = int((z > -1.0).sum(axis=-1).max())
    if size < z.shape[-1]:
        z = np.partition(z, z.shape[-1] - size, axis=-1)[..., -size:]
    low = np.full((*z.shape[:-1], 1), -1.0)
    high = np.full_like(low, -(float(size) ** (-1.0 / power)))
    tau = low
    for _ in range(_STEPS):
        share = np.maximum(z - tau, 0.0)
        slope = share ** (power - 1.0)
        excess = (slope * share).sum(axis=-1, keepdims=True) - 1.0
        low = np.where(excess >= 0.0, tau, low)
        high = np.where(excess >= 0.0, high, tau)
        done = np.abs(excess) <= 1e-12
        if done.all():
            break
        newton = tau + excess / (power * np.maximum(slope.sum(axis=-1, keepdims=True), 1e-300))
        tau = np.where(done, tau, np.where((newton > low) & (newton < high), newton, 0.5 * (low + high)))
    return tau
