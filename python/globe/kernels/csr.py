"""Sparse codes, checked before anything follows their indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from globe.kernels.arguments import is_real, plain

_MOST_COLUMNS = 2**31  # the native kernels number columns in int32


def checked_codes(codes: Any, *, values: bool = True) -> scipy.sparse.csr_array:
    """The codes as a CSR array of float32; its indices may be those of `codes`.

    Parameters
    ----------
    codes : scipy.sparse.csr_array, scipy.sparse.csr_matrix or array_like, shape (n, m)
        SciPy's constructors accept any column numbers, and an array can be changed after it was made.
    values : bool
        Whether the values count, not only their places; they must then be finite in float32.

    Raises
    ------
    ValueError
        If the codes are no matrix of real numbers, or their structure points outside of it.
    """
    if not scipy.sparse.issparse(codes):
        dense = plain("codes", codes)
        if dense.ndim != 2:
            raise ValueError(f"codes: found shape {dense.shape}; expected (n, m); pass one row per mixture")
        return scipy.sparse.csr_array(_single(dense, values))
    if codes.format != "csr":
        raise ValueError(f"codes: found sparse format {codes.format!r}; expected 'csr'; pass codes.tocsr()")
    if len(codes.shape) != 2:
        raise ValueError(f"codes: found shape {codes.shape}; expected (n, m); pass one row per mixture")
    indptr, indices, data = (_vector(name, getattr(codes, name)) for name in ("indptr", "indices", "data"))
    _check_structure(indptr, indices, data, codes.shape)
    return scipy.sparse.csr_array((_single(data, values), indices, indptr), shape=codes.shape)


def csr_arrays(matrix: scipy.sparse.csr_array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Offsets, columns and values as the native kernels take them."""
    return (
        np.ascontiguousarray(matrix.indptr, dtype=np.int64),
        np.ascontiguousarray(matrix.indices, dtype=np.int32),
        np.ascontiguousarray(matrix.data, dtype=np.float32),
    )


def _vector(name: str, array: Any) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray) or array.ndim != 1:
        kind = type(array).__name__
        raise ValueError(f"codes: found {name} of {kind} {np.shape(array)}; expected a plain array of one axis")
    if name == "data":
        if not is_real(array.dtype):
            raise ValueError(f"codes: found {array.dtype}; expected real numbers; convert them first")
    elif array.dtype.kind not in "iu":
        raise ValueError(f"codes: found {name} of {array.dtype}; expected integers; build the matrix anew")
    return array.view(np.ndarray)


def _check_structure(indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], shape: tuple[int, int]) -> None:
    rows, columns = shape
    if len(indptr) != rows + 1:
        raise ValueError(f"codes: found {len(indptr)} offsets in indptr; expected {rows + 1}, one more than rows")
    if indptr[0] != 0:
        raise ValueError(f"codes: found indptr that begins at {indptr[0]}; expected 0; build the matrix anew")
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if falls.size:
        raise ValueError(f"codes: found indptr that falls at row {falls[0]}; expected offsets that do not fall")
    if not indptr[-1] == len(indices) == len(data):
        raise ValueError(
            f"codes: found {len(indices)} columns and {len(data)} values, but indptr ends at {indptr[-1]}; "
            "expected as many; pass codes.copy() after codes.prune(), or build the matrix anew"
        )
    limit = min(columns, _MOST_COLUMNS)
    if len(indices) and not 0 <= indices.min() <= indices.max() < limit:
        place = int(np.flatnonzero((indices < 0) | (indices >= limit))[0])
        row = int(np.searchsorted(indptr, place, side="right")) - 1
        raise ValueError(f"codes: found column {indices[place]} in row {row}; expected 0 to {limit - 1}")


def _single(values: NDArray[Any], count: bool) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        single: NDArray[np.float32] = values.astype(np.float32, copy=False)
    if count and not np.isfinite(single).all():
        worst = values[~np.isfinite(single)].flat[0]
        raise ValueError(f"codes: found {worst}; expected finite numbers in the range of float32, ±3.4e38; scale them")
    return single
