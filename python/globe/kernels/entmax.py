"""Sparse probabilities: entmax, its gradient and its inverse.

Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019;
Martins and Astudillo, "From softmax to sparsemax", ICML 2016 (alpha = 2).
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globe import _native
from globe.kernels.arguments import number, plain, writeable
from globe.kernels.backends import check_threads, choose


def entmax(
    logits: NDArray[Any],
    alpha: float = 1.5,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    out: NDArray[Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Map logits to sparse probabilities along the last axis.

    Solves ``argmax_p ⟨p, z/T⟩ + H_α(p)`` over the probability simplex, with Tsallis entropy H_α. The
    solution is ``p = max((α−1) z/T − τ, 0)^(1/(α−1))`` with τ such that p sums to 1.

    Parameters
    ----------
    logits : array_like, shape (..., d)
        float32 and float64 keep their dtype, other real dtypes give float64. −inf gives probability 0.
    alpha : float
        In (1, 2]; 2 is sparsemax.
    temperature : float
        T > 0.
    epsilon : float
        In [0, 1): probabilities below it become 0 and the rest is scaled to sum to 1. The largest
        probability is always kept.
    out : ndarray, shape (..., d), optional
        Where to write, C-contiguous, in the dtype of the result; spares the cost of fresh memory, which is
        more than half of the time where it exceeds the caches. Must not overlap the logits.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`. The reference computes in float64 and rounds at the
        end, the others compute in the dtype of the result.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default. The reference has one.

    Returns
    -------
    ndarray, shape (..., d)
        Rows sum to 1. The bits do not depend on the number of threads.

    Raises
    ------
    ValueError
        If a row holds NaN or +inf or only −inf, or an argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import entmax
    >>> entmax(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), alpha=2).round(3)
    array([[1.   , 0.   , 0.   ],
           [0.333, 0.333, 0.333]])
    >>> entmax(np.array([2.0, 1.0, 0.0]), temperature=2.0).round(3)  # warmer: a larger support
    array([0.624, 0.292, 0.084])
    """
    alpha, temperature = _options(alpha, temperature)
    epsilon = number("epsilon", epsilon)
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon: found {epsilon}; expected a number in [0, 1)")
    shape, z = _rows("logits", logits)
    if z.shape[1] == 0:
        raise ValueError(f"logits: found shape {shape}; expected (..., d) with d of at least 1")
    result, target = _output(out, shape, z)
    chosen, count = choose(backend), check_threads(threads)
    if chosen == "native":
        _native.entmax(z, target, alpha, temperature, epsilon, count)
    else:
        implementation = importlib.import_module(f"globe.kernels.{chosen}.entmax")
        row = implementation.entmax(z, target, alpha, temperature, epsilon, count)
        if row < len(z):
            raise ValueError(
                f"logits: found NaN, +inf or nothing but -inf in row {row}; "
                "expected at least one finite logit per row, the others finite or -inf"
            )
    return result


def entmax_backward(
    probabilities: NDArray[Any],
    gradient: NDArray[Any],
    alpha: float = 1.5,
    *,
    temperature: float = 1.0,
    out: NDArray[Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Pull a gradient back through :func:`entmax`.

    With ``s = y^(2−α)`` on the support of y and 0 elsewhere, ``dz = s ⊙ (dy − ⟨s, dy⟩ / Σ s) / T``.

    Parameters
    ----------
    probabilities : array_like, shape (..., d)
        Output y of :func:`entmax` with ``epsilon=0``; its dtype is that of the result.
    gradient : array_like, shape (..., d)
        Derivative dy of a scalar with respect to y; not looked at where y is 0.
    alpha, temperature : float
        As given to :func:`entmax`.
    out, backend, threads
        As for :func:`entmax`; out must overlap neither argument.

    Returns
    -------
    ndarray, shape (..., d)
        Derivative with respect to the logits.

    Raises
    ------
    ValueError
        If shapes differ or an argument is out of range.
    """
    alpha, temperature = _options(alpha, temperature)
    shape, y = _rows("probabilities", probabilities)
    dy_shape, dy = _rows("gradient", gradient, y.dtype)
    if dy_shape != shape:
        raise ValueError(f"gradient: found shape {dy_shape}; expected {shape}, the shape of probabilities")
    result, target = _output(out, shape, y, dy)
    chosen, count = choose(backend), check_threads(threads)
    if chosen == "native":
        _native.entmax_backward(y, dy, target, alpha, temperature, count)
    else:
        implementation = importlib.import_module(f"globe.kernels.{chosen}.entmax")
        implementation.entmax_backward(y, dy, target, alpha, temperature, count)
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

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import entmax, entmax_inverse
    >>> codes = np.array([0.75, 0.25, 0.0])
    >>> entmax(entmax_inverse(codes)).round(6)
    array([0.75, 0.25, 0.  ])
    """
    alpha, temperature = _options(alpha, temperature)
    p = plain("probabilities", probabilities)
    dtype = _working(p.dtype)
    p64 = p.astype(np.float64)
    if p64.ndim == 0 or not np.all(p64 >= 0.0) or not np.allclose(p64.sum(axis=-1), 1.0, rtol=0.0, atol=1e-3):
        raise ValueError("probabilities: expected non-negative rows that sum to 1; divide each row by its sum")
    z: NDArray[Any] = (temperature * p64 ** (alpha - 1.0) / (alpha - 1.0)).astype(dtype)
    return z


def _options(alpha: float, temperature: float) -> tuple[float, float]:
    alpha, temperature = number("alpha", alpha), number("temperature", temperature)
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"alpha: found {alpha}; expected a number in (1, 2]; 1.5 is the usual choice")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: found {temperature}; expected a finite number above 0")
    return alpha, temperature


def _working(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype in (np.float32, np.float64) else np.dtype(np.float64)


def _rows(
    argument: str, array: NDArray[Any], dtype: np.dtype[Any] | None = None
) -> tuple[tuple[int, ...], NDArray[Any]]:
    """The shape, and the rows along the last axis as a contiguous matrix; not copied where it is one already."""
    found = plain(argument, array)
    if found.ndim == 0:
        raise ValueError(f"{argument}: found shape {found.shape} of {found.dtype}; expected real numbers, (..., d)")
    matrix = np.require(found, dtype or _working(found.dtype), ["C", "A"])
    return found.shape, matrix.reshape(math.prod(found.shape[:-1]), found.shape[-1])


def _output(
    out: NDArray[Any] | None, shape: tuple[int, ...], *inputs: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The result to return, and its rows to be filled."""
    like = inputs[0]
    result = np.empty(shape, like.dtype) if out is None else out
    target = writeable("out", result, shape, like.dtype).reshape(like.shape)
    if any(np.may_share_memory(target, array) for array in inputs):
        raise ValueError("out: found memory of another argument; expected memory of its own")
    return result, target
