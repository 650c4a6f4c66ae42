"""Sparse mixtures of long vectors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import scipy.sparse
from numpy.typing import DTypeLike, NDArray

from globe import _native

_NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def compose(
    codes: Any,
    bank: NDArray[Any],
    *,
    epsilon: float = 0.0,
    dtype: DTypeLike | None = None,
    threads: int | None = None,
) -> NDArray[Any]:
    """Mix the atoms of a bank: ``out[i] = Σ_j codes[i, j] · bank[j]``.

    Parameters
    ----------
    codes : scipy.sparse.csr_array, scipy.sparse.csr_matrix or ndarray, shape (n, m)
        Mixing weights, used in float32. Entries with ``|value| < epsilon`` count as zero.
    bank : ndarray, shape (m, ...)
        Atoms in float32, float16 or ``ml_dtypes.bfloat16``, C-contiguous.
    epsilon : float
        Threshold for weights, 0 or more.
    dtype : dtype, optional
        Dtype of the result: float32, float16 or ``ml_dtypes.bfloat16``; the bank's by default.
    threads : int, optional
        Threads to use; one per hardware thread by default.

    Returns
    -------
    ndarray, shape (n, *bank.shape[1:])
        Summed in float32 in the order of the stored entries and rounded once. The bits do not depend
        on the number of threads.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.
    """
    bank = np.asarray(bank)
    bank_name = _name("bank", bank.dtype)
    if bank.ndim < 1:
        raise ValueError("bank: found a scalar; expected an array of shape (m, ...); stack the atoms first")
    if not bank.flags.c_contiguous:
        raise ValueError("bank: found a strided array; expected C order; pass numpy.ascontiguousarray(bank)")
    out_dtype = bank.dtype if dtype is None else np.dtype(dtype)
    out_name = _name("dtype", out_dtype)
    epsilon = float(epsilon)
    if not 0.0 <= epsilon < np.inf:
        raise ValueError(f"epsilon: found {epsilon}; expected a finite number of at least 0")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: found {threads}; expected at least 1, or None for one per hardware thread")

    matrix = _csr(codes)
    n, m = matrix.shape
    if bank.shape[0] != m:
        raise ValueError(
            f"bank: found {bank.shape[0]} atoms; expected {m}, one per column of codes; check that both belong together"
        )
    width = int(np.prod(bank.shape[1:], dtype=np.int64))
    out = np.empty((n, *bank.shape[1:]), dtype=out_dtype)
    _native.compose(
        np.ascontiguousarray(matrix.indptr, dtype=np.int64),
        np.ascontiguousarray(matrix.indices, dtype=np.int32),
        np.ascontiguousarray(matrix.data, dtype=np.float32),
        _storage(bank).reshape(m, width),
        bank_name,
        _storage(out).reshape(n, width),
        out_name,
        epsilon,
        threads or 0,
    )
    return out


def _name(argument: str, dtype: np.dtype[Any]) -> str:
    if dtype not in _NAMES:
        raise ValueError(f"{argument}: found {dtype}; expected float32, float16 or ml_dtypes.bfloat16; convert first")
    return _NAMES[dtype]


def _storage(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.dtype == np.float32 else array.view(np.uint16)


def _csr(codes: Any) -> Any:
    if scipy.sparse.issparse(codes):
        if codes.format != "csr":
            raise ValueError(f"codes: found sparse format {codes.format!r}; expected 'csr'; pass codes.tocsr()")
        return codes
    dense = np.asarray(codes)
    if dense.ndim != 2:
        raise ValueError(f"codes: found shape {dense.shape}; expected (n, m); pass one row per mixture")
    return scipy.sparse.csr_array(dense.astype(np.float32, copy=False))
