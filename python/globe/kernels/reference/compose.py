"""Sparse mixtures as SciPy products."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


def compose(codes: scipy.sparse.csr_array, bank: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    """out = codes · bank, in float32."""
    out[...] = codes @ bank.astype(np.float32)


def code_gradient(
    codes: scipy.sparse.csr_array, gradient: NDArray[Any], bank: NDArray[Any], threads: int
) -> NDArray[np.float64]:
    """⟨gradient[i], bank[j]⟩ for every stored entry (i, j) of codes."""
    products = np.empty(codes.nnz)
    for row, (start, stop) in enumerate(zip(codes.indptr, codes.indptr[1:], strict=False)):
        atoms = bank[codes.indices[start:stop]].astype(np.float64)
        products[start:stop] = atoms @ gradient[row].astype(np.float64)
    return products
