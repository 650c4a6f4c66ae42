"""Products with sparse mixtures that are never formed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from globe import _native
from globe.kernels.arguments import plain, writeable
from globe.kernels.backends import check_threads, choose
from globe.kernels.csr import checked_codes, csr_arrays
from globe.kernels.dtypes import NAMES, contiguous, kind_of, matrix, storage


def compose_matmul(
    codes: Any,
    bank: NDArray[Any],
    x: NDArray[Any],
    *,
    rows: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Multiply each token with a mixture of a bank's matrices: ``out[t] = (Σ_j codes[rows[t], j] · bank[j]) x[t]``.

    Parameters
    ----------
    codes : scipy.sparse.csr_array, scipy.sparse.csr_matrix or ndarray, shape (n, m)
        Mixing weights, used in float32, in which they must be finite.
    bank : ndarray, shape (m, r, d)
        Atoms in float32, float16 or ``ml_dtypes.bfloat16``, C-contiguous.
    x : ndarray, shape (tokens, d)
        In one of the same dtypes, C-contiguous.
    rows : array_like of int, shape (tokens,), optional
        Each token's row of codes, 0 by default.
    dtype : dtype, optional
        Dtype of the result: float32, float16 or ``ml_dtypes.bfloat16``; that of `x` by default.
    out : ndarray, shape (tokens, r), optional
        Where to write, C-contiguous, in `dtype`. Must not overlap the bank or `x`.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default.

    Returns
    -------
    ndarray, shape (tokens, r)
        In float32 inside, rounded once. The native kernel rounds a mixture of more than 8 tokens to bfloat16 where bank
        and `x` are bfloat16 and the machine has bfloat16 dot products. It reads the bank once, whichever of its atoms
        the mixtures share. The bits do not depend on the number of threads.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import compose_matmul
    >>> bank = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], dtype=np.float32)
    >>> compose_matmul(np.array([[1, 0.5]]), bank, np.array([[2, 4]], dtype=np.float32))
    array([[4., 5.]], dtype=float32)
    """
    weights = checked_codes(codes)
    atoms, tokens = contiguous("bank", bank), matrix("x", x)
    if atoms.ndim != 3 or atoms.shape[::2] != (weights.shape[1], tokens.shape[1]):
        raise ValueError(
            f"bank: found shape {atoms.shape}; expected ({weights.shape[1]}, r, {tokens.shape[1]}): "
            "a matrix per column of codes, a column of it per column of x"
        )
    places = _places(rows, len(tokens), weights.shape[0])
    shape = (len(tokens), atoms.shape[1])
    kind = kind_of(dtype, tokens.dtype if out is None else getattr(out, "dtype", tokens.dtype))
    target = np.empty(shape, kind) if out is None else writeable("out", out, shape, kind)
    if out is not None and (np.may_share_memory(target, atoms) or np.may_share_memory(target, tokens)):
        raise ValueError("out: found memory shared with bank or x; expected separate memory; pass a new array")
    count = check_threads(threads)
    chosen = choose(backend)
    if chosen == "native":
        flat = storage(atoms).reshape(len(atoms), atoms.shape[1] * atoms.shape[2])
        _native.compose_matmul(
            *(*csr_arrays(weights), flat, NAMES[atoms.dtype], places),
            *(storage(tokens), NAMES[tokens.dtype], storage(target), NAMES[kind], count),
        )
    else:
        _implementation(chosen).compose_matmul(weights, atoms, tokens, places, target, count)
    return target if out is None else out


def _places(rows: ArrayLike | None, tokens: int, limit: int) -> NDArray[np.int64]:
    found = plain("rows", np.zeros(tokens, np.int64) if rows is None else rows)
    if found.shape != (tokens,) or (tokens and found.dtype.kind not in "iu"):
        raise ValueError(f"rows: found {found.dtype} of shape {found.shape}; expected an integer for each row of x")
    if tokens and not 0 <= found.min() <= found.max() < limit:
        wrong = found[(found < 0) | (found >= limit)][0]
        raise ValueError(f"rows: found {wrong}; expected 0 to {limit - 1}, a row of codes")
    return np.ascontiguousarray(found, np.int64)


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"globe.kernels.{backend}.compose_matmul")
