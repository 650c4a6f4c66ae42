"""Gram matrices of long vectors. Goal: 1.6 times NumPy's SYRK on a CPU with bf16 dot products."""

import ml_dtypes
import numpy as np

from globe.kernels import gram


class Gram:
    params = (["float32", "bfloat16"], [128, 512], ["native", "numba"])
    param_names = ("dtype", "n", "backend")

    def setup(self, dtype, n, backend):
        kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        self.vectors = np.random.default_rng(0).standard_normal((n, 1 << 14), dtype=np.float32).astype(kind)
        self.time_gram(dtype, n, backend)  # Numba compiles

    def time_gram(self, dtype, n, backend):
        gram(self.vectors, threads=1, backend=backend)

    def peakmem_gram(self, dtype, n, backend):
        gram(self.vectors, threads=1, backend=backend)

    def track_error(self, dtype, n, backend):
        exact = self.vectors[:16].astype(np.float64)
        exact = exact @ exact.T
        return float(np.linalg.norm(gram(self.vectors, backend=backend)[:16, :16] - exact) / np.linalg.norm(exact))

    track_error.unit = "relative"
