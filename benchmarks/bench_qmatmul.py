"""Products with packed weights, 1408 x 704 in groups of 64. Goal: 1.5 of the best peer at 1 token, 1 at 256."""

import ml_dtypes
import numpy as np

from globe.kernels import qmatmul


class QMatmul:
    params = ([4, 8], [1, 16, 256], ["native", "numba"])
    param_names = ("bits", "tokens", "backend")

    def setup(self, bits, tokens, backend):
        rng = np.random.default_rng(0)
        self.packed = rng.integers(-(2**31), 2**31, (1408, 704 * bits // 32), np.int32)
        self.scales = rng.random((1408, 11), dtype=np.float32).astype(ml_dtypes.bfloat16)
        self.x = rng.standard_normal((tokens, 704), dtype=np.float32).astype(ml_dtypes.bfloat16)
        self.out = qmatmul(self.x, self.packed, self.scales, dtype=np.float32, backend=backend)  # Numba compiles

    def time_qmatmul(self, bits, tokens, backend):
        qmatmul(self.x, self.packed, self.scales, out=self.out, backend=backend, threads=1)

    def track_error(self, bits, tokens, backend):
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        unsigned = (self.packed.view(np.uint32)[:, :, None] >> shifts) & ((1 << bits) - 1)
        whole = unsigned.reshape(1408, 704).astype(np.float64) - (1 << bits - 1)
        exact = self.x.astype(np.float64) @ (whole * np.repeat(self.scales.astype(np.float64), 64, axis=1)).T
        return float(np.linalg.norm(self.out - exact) / np.linalg.norm(exact))

    track_error.unit = "relative"
