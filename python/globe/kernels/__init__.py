"""Mathematics on arrays: no files, no torch, nothing that knows what an expert is."""

from globe.kernels.backends import available, set_num_threads
from globe.kernels.compose import compose, compose_bank_gradient, compose_code_gradient
from globe.kernels.compose_matmul import compose_matmul
from globe.kernels.entmax import entmax, entmax_backward, entmax_inverse
from globe.kernels.gram import GramAccumulator, gram
from globe.kernels.nnls import NnlsResult, NnlsStatus, nnls
from globe.kernels.qmatmul import qmatmul

__all__ = [
    "available",
    "set_num_threads",
    "gram",
    "GramAccumulator",
    "nnls",
    "NnlsResult",
    "NnlsStatus",
    "entmax",
    "entmax_backward",
    "entmax_inverse",
    "compose",
    "compose_bank_gradient",
    "compose_code_gradient",
    "compose_matmul",
    "qmatmul",
]
