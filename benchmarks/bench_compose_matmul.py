"""Products with mixtures of 12 atoms of 704 x 2048. Goal, 1 token: 0.8 of the bandwidth of a copy."""

import ml_dtypes
import numpy as np

from globe.kernels import compose_matmul


class ComposeMatmul:
    params = (["float32", "bfloat16"], [1, 16, 64], [1, 4], ["native", "numba"])
    param_names = ("dtype", "tokens", "mixtures", "backend")

    def setup(self, dtype, tokens, mixtures, backend):
        rng = np.random.default_rng(0)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        self.codes = rng.random((mixtures, 12), dtype=np.float32)
        self.bank = rng.standard_normal((12, 704, 2048), dtype=np.float32).astype(kind)
        self.x = rng.standard_normal((tokens, 2048), dtype=np.float32).astype(kind)
        self.rows = np.arange(tokens) % mixtures
        self.out = self.run(backend, None)  # Numba compiles

    def run(self, backend, out):
        settings = {"rows": self.rows, "dtype": np.float32, "out": out, "backend": backend, "threads": 1}
        return compose_matmul(self.codes, self.bank, self.x, **settings)

    def time_compose_matmul(self, dtype, tokens, mixtures, backend):
        self.run(backend, self.out)

    def track_error(self, dtype, tokens, mixtures, backend):
        some = self.bank[:, :8].astype(np.float64)
        formed = np.einsum("nm,mrd->nrd", self.codes.astype(np.float64), some)[self.rows]
        exact = np.einsum("trd,td->tr", formed, self.x.astype(np.float64))
        return float(np.linalg.norm(self.out[:, :8] - exact) / np.linalg.norm(exact))

    track_error.unit = "relative"
