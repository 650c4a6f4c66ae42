"""Gram matrices of long vectors."""

from __future__ import annotations

import importlib
import io
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from globe import _native
from globe.kernels.arguments import plain
from globe.kernels.backends import check_threads, choose

_NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float64): "float64",
}


def gram(
    vectors: NDArray[Any],
    *,
    weights: ArrayLike | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Compute the inner products ``G = X diag(w) Xᵀ`` of the rows of X.

    Parameters
    ----------
    vectors : ndarray, shape (n, k)
        X in float32, float16, ``ml_dtypes.bfloat16`` or float64, one vector per row. Read in blocks of columns,
        so it may be a memory map, and a slice of the columns of a larger array is not copied.
    weights : array_like, shape (k,), optional
        Non-negative weight of each column, used in float32 with vectors other than float64; all 1 by default.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`. float64 vectors always take the reference.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default. The reference and Numba versions multiply
        with BLAS, which has its own threads besides.

    Returns
    -------
    ndarray of float64, shape (n, n)
        Exactly symmetric. Products are summed in float32 (float64 for float64 vectors) inside a block of columns
        and in float64 across blocks; what is below 1.2e-38 there may count as zero. The bits of the native result
        do not depend on the number of threads.

    Raises
    ------
    ValueError
        If an argument has a wrong shape, dtype or value, with the argument named.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import gram
    >>> vectors = np.array([[1, 0, 2], [0, 3, 1]], dtype=np.float32)
    >>> gram(vectors)
    array([[ 5.,  2.],
           [ 2., 10.]])
    >>> gram(vectors, weights=[1, 0, 1])
    array([[5., 2.],
           [2., 1.]])
    """
    vectors = plain("vectors", vectors)
    if vectors.ndim != 2:
        raise ValueError(f"vectors: found shape {vectors.shape}; expected (n, k); flatten each vector into a row")
    accumulator = GramAccumulator(vectors.shape[0])
    accumulator.add(vectors, weights=weights, backend=backend, threads=threads)
    _native.gram_mirror(accumulator._lower)  # nobody else has it: no copy
    return accumulator._lower


class GramAccumulator:
    """The sum of the Gram matrices of blocks: ``Σ_b X_b diag(w_b) X_bᵀ``.

    Blocks hold some of the columns of all n vectors, in any order and of any sizes. Accumulators filled by
    several processes can be merged, and travel as bytes.

    Parameters
    ----------
    n : int
        Number of vectors.

    Raises
    ------
    ValueError
        If n is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from globe.kernels import GramAccumulator
    >>> first, second = GramAccumulator(2), GramAccumulator(2)
    >>> first.add(np.ones((2, 3), dtype=np.float32))
    >>> second.add(np.eye(2, dtype=np.float32))
    >>> first.merge(GramAccumulator.from_bytes(second.to_bytes()))
    >>> first.matrix
    array([[4., 3.],
           [3., 4.]])
    >>> first.columns
    5
    """

    def __init__(self, n: int) -> None:
        if n < 0:
            raise ValueError(f"n: found {n}; expected a number of vectors")
        self._lower = np.zeros((n, n))
        self._columns = 0
        self._torn = False  # by an interruption, with part of a block added

    @property
    def columns(self) -> int:
        """Columns seen so far."""
        return self._columns

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The Gram matrix of all blocks so far, shape (n, n), exactly symmetric; a copy."""
        self._check_whole()
        full = self._lower.copy()
        _native.gram_mirror(full)
        return full

    def add(
        self,
        block: NDArray[Any],
        *,
        weights: ArrayLike | None = None,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Add a block, shape (n, any number of columns); the other arguments are those of :func:`gram`.

        Raises
        ------
        ValueError
            If an argument has a wrong shape, dtype or value, with the argument named.
        RuntimeError
            If the addition of an earlier block was interrupted (Ctrl-C), as for all other uses.
        """
        self._check_whole()
        block = plain("vectors", block)
        n = len(self._lower)
        if block.ndim != 2 or block.shape[0] != n:
            raise ValueError(f"vectors: found shape {block.shape}; expected ({n}, k), one row per vector")
        if block.dtype not in _NAMES:
            raise ValueError(
                f"vectors: found {block.dtype}; expected float32, float16, bfloat16 or float64; convert with astype"
            )
        factors = None if weights is None else _weights(weights, block)
        chosen, count = choose(backend), check_threads(threads)
        if block.dtype == np.float64:
            chosen = "reference"
        self._torn = True
        if chosen == "native":
            step = block.strides[0]
            if block.strides[1] != block.itemsize or step % block.itemsize or step < block.shape[1] * block.itemsize:
                block = np.ascontiguousarray(block)
            storage = block if block.dtype == np.float32 else block.view(np.uint16)
            single = None if factors is None else factors.astype(np.float32)
            _native.gram_add(storage, _NAMES[block.dtype], self._lower, single, count)
        else:
            importlib.import_module(f"globe.kernels.{chosen}.gram").add(block, self._lower, factors, count)
        self._columns += block.shape[1]
        self._torn = False

    def _check_whole(self) -> None:
        if self._torn:
            raise RuntimeError("the addition of a block was interrupted: part of it is in the sum; start a new one")

    def merge(self, other: GramAccumulator) -> None:
        """Add all that another accumulator of the same vectors has seen.

        Raises
        ------
        ValueError
            If the other is for another number of vectors.
        """
        self._check_whole()
        other._check_whole()
        if other._lower.shape != self._lower.shape:
            raise ValueError(f"other: found {len(other._lower)} vectors; expected {len(self._lower)}, as here")
        self._lower += other._lower
        self._columns += other._columns

    def to_bytes(self) -> bytes:
        """The state, for :meth:`from_bytes`, in NumPy's npz format."""
        self._check_whole()
        buffer = io.BytesIO()
        np.savez(buffer, lower=self._lower, columns=np.int64(self._columns))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, state: bytes) -> GramAccumulator:
        """The accumulator that :meth:`to_bytes` came from.

        Raises
        ------
        ValueError
            If the bytes are not such a state.
        """
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as stored:
                lower, columns = stored["lower"], int(stored["columns"])
        except Exception as error:
            raise ValueError(f"state: found bytes that are no stored accumulator ({error})") from None
        if lower.dtype != np.float64 or lower.ndim != 2 or lower.shape[0] != lower.shape[1]:
            raise ValueError(f"state: found {lower.dtype} of shape {lower.shape}; expected a square float64 matrix")
        accumulator = cls(len(lower))
        accumulator._lower[...] = lower
        accumulator._columns = columns
        return accumulator


def _weights(weights: ArrayLike, vectors: NDArray[Any]) -> NDArray[np.float64]:
    """The weights, rounded to float32 where the products are in float32."""
    array = plain("weights", weights).astype(np.float64)
    k = vectors.shape[1]
    if array.shape != (k,):
        raise ValueError(f"weights: found shape {array.shape}; expected ({k},), one weight per column of vectors")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError("weights: found a negative or non-finite weight; expected finite weights of at least 0")
    if vectors.dtype == np.float64:
        return array
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise ValueError(
            f"weights: found {array.max():.4g}; expected at most 3.4e38, the range of float32, with vectors of "
            f"{vectors.dtype}; scale the weights, or pass float64 vectors"
        )
    return single.astype(np.float64)
