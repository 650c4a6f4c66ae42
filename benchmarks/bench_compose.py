"""Sparse composition: 32 rows of 8 entries, 128 atoms. Goal: no slower than SciPy's CSR product."""

import ml_dtypes
import numpy as np
import scipy.sparse

from globe.kernels import compose


class Compose:
    params = (["float32", "bfloat16"], [1 << 16, 1 << 20])
    param_names = ("dtype", "width")

    def setup(self, dtype, width):
        rng = np.random.default_rng(0)
        columns = np.concatenate([rng.choice(128, 8, replace=False) for _ in range(32)])
        values = rng.random(32 * 8, dtype=np.float32)
        self.codes = scipy.sparse.csr_array((values, columns, np.arange(0, 257, 8)), shape=(32, 128))
        self.float32 = rng.standard_normal((128, width), dtype=np.float32)
        self.bank = self.float32.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else self.float32

    def time_compose(self, dtype, width):
        compose(self.codes, self.bank, threads=1)

    def time_scipy_float32(self, dtype, width):
        self.codes @ self.float32

    def peakmem_compose(self, dtype, width):
        compose(self.codes, self.bank, threads=1)
