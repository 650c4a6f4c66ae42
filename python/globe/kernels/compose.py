"""Sparse mixtures of long vectors, and the derivatives that training them needs."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import DTypeLike, NDArray

from globe import _native
from globe.kernels.arguments import number, plain, writeable
from globe.kernels.backends import check_threads, choose
from globe.kernels.csr import checked_codes, csr_arrays
from globe.kernels.dtypes import NAMES, contiguous, kind_of, storage


def compose(
    codes: Any,
    bank: NDArray[Any],
    *,
    epsilon: float = 0.0,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Mix the atoms of a bank: ``out[i] = Σ_j codes[i, j] · bank[j]``.

    Parameters
    ----------
    codes : scipy.sparse.csr_array, scipy.sparse.csr_matrix or ndarray, shape (n, m)
        Mixing weights, used in float32, in which they must be finite. Entries with ``|value| < epsilon`` count
        as zero.
    bank : ndarray, shape (m, ...)
        Atoms in float32, float16 or ``ml_dtypes.bfloat16``, C-contiguous.
    epsilon : float
        Threshold for weights, 0 or more.
    dtype : dtype, optional
        Dtype of the result: float32, float16 or ``ml_dtypes.bfloat16``; the bank's by default.
    out : ndarray, shape (n, ...), optional
        Where to write, C-contiguous, in `dtype`; spares the cost of fresh memory. Must not overlap the bank.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default.

    Returns
    -------
    ndarray, shape (n, ...)
        Summed in float32 in the order of the stored entries and rounded once. The bits do not depend
        on the number of threads.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import compose
    >>> bank = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)
    >>> compose(np.array([[1, 0, 2], [0, 0.5, 0]]), bank)
    array([[11. , 14. ],
           [ 1.5,  2. ]], dtype=float32)
    """
    matrix = checked_codes(codes)
    flat = _wide("bank", bank, matrix.shape[1], "one per column of codes")
    shape = (matrix.shape[0], *np.shape(bank)[1:])
    kind = kind_of(dtype, flat.dtype if out is None else getattr(out, "dtype", flat.dtype))
    if out is None:
        out = np.empty(shape, dtype=kind)
    target = writeable("out", out, shape, kind).reshape(shape[0], flat.shape[1])
    if np.may_share_memory(target, flat):
        raise ValueError("out: found memory shared with the bank; expected separate memory; pass a new array")
    epsilon = number("epsilon", epsilon)
    if not 0.0 <= epsilon < np.inf:
        raise ValueError(f"epsilon: found {epsilon}; expected a finite number of at least 0")
    count = check_threads(threads)
    chosen = choose(backend)
    if chosen == "native":
        arguments = (*csr_arrays(matrix), storage(flat), NAMES[flat.dtype], storage(target), NAMES[target.dtype])
        _native.compose(*arguments, epsilon, count)
    else:
        _implementation(chosen).compose(_prune(matrix, epsilon), flat, target, count)
    return out


def compose_bank_gradient(
    codes: Any,
    gradient: NDArray[Any],
    *,
    epsilon: float = 0.0,
    dtype: DTypeLike | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[Any]:
    """Pull a gradient back to the bank: ``out[j] = Σ_i codes[i, j] · gradient[i]``, the adjoint of `compose`.

    Parameters
    ----------
    codes : as for :func:`compose`, shape (n, m)
    gradient : ndarray, shape (n, ...)
        Derivative of a scalar with respect to the mixtures; float32, float16 or ``ml_dtypes.bfloat16``.
    epsilon, dtype, backend, threads
        As for :func:`compose`.

    Returns
    -------
    ndarray, shape (m, ...)

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.
    """
    matrix = checked_codes(codes)
    rows = plain("gradient", gradient)
    _wide("gradient", rows, matrix.shape[0], "one per row of codes")
    transposed = matrix.T.tocsr()
    return compose(transposed, rows, epsilon=epsilon, dtype=dtype, backend=backend, threads=threads)


def compose_code_gradient(
    codes: Any, gradient: NDArray[Any], bank: NDArray[Any], *, backend: str = "auto", threads: int | None = None
) -> scipy.sparse.csr_array:
    """Pull a gradient back to the codes: ``⟨gradient[i], bank[j]⟩`` for every stored entry of codes.

    Parameters
    ----------
    codes : as for :func:`compose`, shape (n, m)
        Only the places of the stored entries matter, not their values.
    gradient : ndarray, shape (n, ...)
        Derivative of a scalar with respect to the mixtures; float32, float16 or ``ml_dtypes.bfloat16``.
    bank : ndarray, shape (m, ...)
    backend, threads
        As for :func:`compose`.

    Returns
    -------
    scipy.sparse.csr_array of float64, shape (n, m)
        With the places of codes, in memory of its own. Summed in float32 over short runs and in float64 across
        them; the bits do not depend on the number of threads.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import compose_code_gradient
    >>> bank = np.array([[1, 2], [3, 4]], dtype=np.float32)
    >>> compose_code_gradient(np.array([[1, 0], [2, 1]]), np.eye(2, dtype=np.float32), bank).toarray()
    array([[1., 0.],
           [2., 4.]])
    """
    matrix = checked_codes(codes, values=False)
    atoms = _wide("bank", bank, matrix.shape[1], "one per column of codes")
    rows = _wide("gradient", gradient, matrix.shape[0], "one per row of codes")
    if np.shape(gradient)[1:] != np.shape(bank)[1:]:
        raise ValueError(
            f"gradient: found rows of shape {np.shape(gradient)[1:]}; expected {np.shape(bank)[1:]}, as the bank's"
        )
    count = check_threads(threads)
    chosen = choose(backend)
    if chosen == "native":
        kinds = NAMES[rows.dtype], NAMES[atoms.dtype]
        products = _native.compose_code_gradient(
            *csr_arrays(matrix), storage(rows), kinds[0], storage(atoms), kinds[1], count
        )
    else:
        products = _implementation(chosen).code_gradient(matrix, rows, atoms, count)
    return scipy.sparse.csr_array((products, matrix.indices.copy(), matrix.indptr.copy()), shape=matrix.shape)


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"globe.kernels.{backend}.compose")


def _prune(codes: scipy.sparse.csr_array, epsilon: float) -> scipy.sparse.csr_array:
    if epsilon == 0.0:
        return codes
    pruned = codes.copy()
    pruned.data[np.abs(pruned.data) < np.float32(epsilon)] = 0.0
    pruned.eliminate_zeros()
    return pruned


def _wide(argument: str, array: NDArray[Any], rows: int, of_what: str) -> NDArray[Any]:
    """The array as a matrix with one long row for each of `rows`."""
    array = contiguous(argument, array)
    if array.ndim < 1:
        raise ValueError(f"{argument}: found a scalar; expected an array of shape (rows, ...); stack the vectors first")
    if array.shape[0] != rows:
        raise ValueError(
            f"{argument}: found {array.shape[0]} vectors; expected {rows}, {of_what}; check that both belong together"
        )
    return array.reshape(rows, int(np.prod(array.shape[1:], dtype=np.int64)))
