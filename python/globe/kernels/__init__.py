"""Mathematics on arrays: no files, no torch, nothing that knows what an expert is."""

from globe.kernels.compose import compose
from globe.kernels.entmax import entmax, entmax_backward, entmax_inverse
from globe.kernels.gram import gram
from globe.kernels.nnls import NnlsResult, NnlsStatus, nnls

__all__ = [
    "gram",
    "nnls",
    "NnlsResult",
    "NnlsStatus",
    "entmax",
    "entmax_backward",
    "entmax_inverse",
    "compose",
]
