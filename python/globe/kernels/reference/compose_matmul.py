"""Products with mixtures, each formed in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


def compose_matmul(
    codes: scipy.sparse.csr_array,
    bank: NDArray[Any],
    x: NDArray[Any],
    rows: NDArray[np.int64],
    out: NDArray[Any],
    threads: int,
) -> None:
    """out[t] = (Σ_j codes[rows[t], j] · bank[j]) x[t], mixtures in float32 and products in float64."""
    for row in np.unique(rows):
        start, stop = codes.indptr[row], codes.indptr[row + 1]
        atoms = bank[codes.indices[start:stop]].astype(np.float32)
        mixture = np.einsum("j,jrd->rd", codes.data[start:stop], atoms)
        chosen = rows == row
        out[chosen] = x[chosen].astype(np.float64) @ mixture.T.astype(np.float64)
