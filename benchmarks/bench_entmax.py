"""Sparse probabilities of rows of float32. Goal: 8 times faster than the entmax package at its best k."""

import numpy as np
import torch

from globe.kernels import entmax, entmax_backward

try:
    import entmax as package
except ImportError:
    package = None


class Entmax:
    params = ([1.25, 1.5, 2.0], [(8192, 512), (1440, 360)], ["native", "numba"])
    param_names = ("alpha", "shape", "backend")

    def setup(self, alpha, shape, backend):
        rng = np.random.default_rng(0)
        self.logits, self.gradient = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        self.probabilities = entmax(self.logits, alpha, backend=backend)
        self.out = entmax_backward(self.probabilities, self.gradient, alpha, backend=backend)

    def time_forward(self, alpha, shape, backend):
        entmax(self.logits, alpha, out=self.out, backend=backend, threads=1)

    def time_forward_into_fresh_memory(self, alpha, shape, backend):
        entmax(self.logits, alpha, backend=backend, threads=1)

    def time_backward(self, alpha, shape, backend):
        entmax_backward(self.probabilities, self.gradient, alpha, out=self.out, backend=backend, threads=1)

    def peakmem_forward(self, alpha, shape, backend):
        entmax(self.logits, alpha, backend=backend, threads=1)

    def track_error(self, alpha, shape, backend):
        exact = entmax(self.logits.astype(np.float64), alpha, backend="reference")
        return float(np.abs(self.probabilities - exact).max())


class Peer:
    params = (["sparsemax", "entmax15"], [(8192, 512), (1440, 360)], [8, 16, 32, 64])
    param_names = ("map", "shape", "k")

    def setup(self, name, shape, k):
        if package is None:
            raise NotImplementedError("the entmax package is not installed")
        torch.set_num_threads(1)
        self.map = getattr(package, name)
        rng = np.random.default_rng(0)
        self.logits = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def time_forward(self, name, shape, k):
        self.map(self.logits, k=k)
