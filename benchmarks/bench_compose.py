"""Sparse composition: 32 rows of 8 entries, 128 atoms. Goal: 70 % of the bandwidth of a copy."""

import ml_dtypes
import numpy as np
import scipy.sparse

from globe.kernels import compose, compose_code_gradient


class Compose:
    params = (["float32", "bfloat16"], [1 << 14, 1 << 18], ["native", "numba"])
    param_names = ("dtype", "width", "backend")

    def setup(self, dtype, width, backend):
        rng = np.random.default_rng(0)
        columns = np.concatenate([rng.choice(128, 8, replace=False) for _ in range(32)])
        values = rng.random(32 * 8, dtype=np.float32)
        self.codes = scipy.sparse.csr_array((values, columns, np.arange(0, 257, 8)), shape=(32, 128))
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        self.bank = rng.standard_normal((128, width), dtype=np.float32).astype(kind)
        self.out = compose(self.codes, self.bank, backend=backend)  # Numba compiles

    def time_compose(self, dtype, width, backend):
        compose(self.codes, self.bank, out=self.out, backend=backend, threads=1)

    def time_code_gradient(self, dtype, width, backend):
        compose_code_gradient(self.codes, self.out, self.bank, backend=backend, threads=1)

    def peakmem_compose(self, dtype, width, backend):
        compose(self.codes, self.bank, out=self.out, backend=backend, threads=1)

    def track_error(self, dtype, width, backend):
        some = slice(0, 1 << 12)
        exact = self.codes.astype(np.float64) @ self.bank[:, some].astype(np.float64)
        return float(np.linalg.norm(self.out[:, some] - exact) / np.linalg.norm(exact))

    track_error.unit = "relative"
