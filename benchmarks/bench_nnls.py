"""Non-negative least squares from a Gram matrix, Gaussian atoms, supports of half the atoms without the simplex.

Goals: twice as fast as spams.lasso, five times as fast as SciPy, faster than spams.decompSimplex.
"""

import numpy as np
import scipy.linalg
import scipy.optimize

from globe.kernels import available, nnls

try:
    import spams
except ImportError:
    spams = None

ROWS = {64: 1000, 256: 100, 1024: 4}


def problem(m, targets):
    """Atoms, targets, Gram matrix and correlations; mixed targets are mixtures of all atoms with both signs."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((m, 2 * m))
    points = rng.standard_normal((ROWS[m], 2 * m))
    if targets == "mixed":
        points = 0.5 * points + rng.standard_normal((ROWS[m], m)) @ atoms
    return atoms, points, atoms @ atoms.T, points @ atoms.T


class Nnls:
    params = ([64, 256, 1024], ["gaussian", "mixed"], [False, True], ["native", "numba"])
    param_names = ("m", "targets", "simplex", "backend")

    def setup(self, m, targets, simplex, backend):
        if backend not in available()["backends"]:
            raise NotImplementedError(f"{backend} is not installed")
        _, _, self.gram, self.correlations = problem(m, targets)
        self.supports = self.solve(simplex, backend).codes > 0

    def solve(self, simplex, backend, **options):
        return nnls(self.gram, self.correlations, simplex=simplex, backend=backend, threads=1, **options)

    def time_cold(self, m, targets, simplex, backend):
        self.solve(simplex, backend)

    def time_warm(self, m, targets, simplex, backend):
        self.solve(simplex, backend, warm_start=self.supports)

    def time_eight_atoms(self, m, targets, simplex, backend):
        self.solve(simplex, backend, max_support=8)

    def peakmem_cold(self, m, targets, simplex, backend):
        self.solve(simplex, backend)

    def track_kkt_residual(self, m, targets, simplex, backend):
        return float(self.solve(simplex, backend).kkt_residual.max())

    def track_iterations(self, m, targets, simplex, backend):
        return float(self.solve(simplex, backend).iterations.mean())


class Scipy:
    params = ([64, 256], ["gaussian", "mixed"])
    param_names = ("m", "targets")

    def setup(self, m, targets):
        _, _, gram, correlations = problem(m, targets)
        lower = scipy.linalg.cholesky(gram, lower=True)
        self.root, self.sides = lower.T, scipy.linalg.solve_triangular(lower, correlations.T, lower=True).T

    def time_cholesky_factor(self, m, targets):
        for side in self.sides:
            scipy.optimize.nnls(self.root, side)


class Spams:
    params = ([64, 256], ["gaussian", "mixed"])
    param_names = ("m", "targets")

    def setup(self, m, targets):
        if spams is None:
            raise NotImplementedError("spams is not installed")
        arrays = (np.asfortranarray(array.T) for array in problem(m, targets))
        self.atoms, self.points, self.gram, self.correlations = arrays

    def time_lasso(self, m, targets):
        options = {"lambda1": 0.0, "mode": spams.PENALTY, "pos": True, "numThreads": 1}
        spams.lasso(self.points, Q=self.gram, q=self.correlations, **options)

    def time_simplex(self, m, targets):
        spams.decompSimplex(self.points, self.atoms, computeXtX=True, numThreads=1)
