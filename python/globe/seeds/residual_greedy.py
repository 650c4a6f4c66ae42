"""Seeds atom by atom, each for what those before it leave (specification, E)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from globe import kernels
from globe.seeds.gram_space import floor, seeds_from_gram, signs, too_few
from globe.seeds.sources import proxies_of
from globe.seeds.task import Seeds, SeedTask
from globe.settings import Settings

Array = NDArray[np.float64]
_STEPS = 100
_CONVERGED = 1e-9


def residual_greedy(task: SeedTask) -> Seeds:
    """Atom by atom, the leading left singular vector of the residuals of the proxies coded on the atoms so far.

    All on one N × N Gram; the proxies are read twice. See `greedy`.
    """
    return seeds_from_gram(proxies_of(task), lambda task, gram: greedy(task, gram, np.empty((0, len(gram))), task.size))


def greedy(task: SeedTask, gram: Array, weights: Array, size: int) -> Array:
    """Weights (size, N) of unit atoms that continue `weights` (any number of them, N).

    With atoms X wᵀ and codes α the residuals are X E, E = I − wᵀαᵀ, and (X E)ᵀ(X E) = EᵀCE. Its leading eigenvector
    v, from a randomised block power iteration, gives the next atom X E v/‖·‖, signed such that the positive part of
    v carries the most energy. Codes are NNLS, or the non-negative lasso, started from the last supports.

    Raises
    ------
    GlobeError
        If the residuals vanish before.
    """
    random = np.random.default_rng(task.settings.seed)
    products, supports = gram @ weights.T, np.zeros((len(gram), 0), dtype=bool)
    while len(weights) < size:
        codes = _codes(weights @ products, products, task.settings, supports)
        start = random.standard_normal((len(gram), min(len(gram), 1 + task.settings.oversampling)))
        energy, direction = _leading(gram, weights, codes, start)
        if energy <= floor(gram):
            raise too_few(task, len(weights), "are spanned by")
        atom = direction - weights.T @ (codes.T @ direction)
        image = gram @ atom
        length = np.sqrt(atom @ image)
        atom, image = atom / length, image / length
        weights, products = np.vstack([weights, atom]), np.column_stack([products, image])
        supports = np.column_stack([codes > 0, direction > 0])
    return weights


def _codes(gram: Array, products: Array, settings: Settings, supports: NDArray[np.bool_]) -> Array:
    """Codes (N, j) of the proxies on the j atoms so far."""
    if not len(gram):
        return products
    if settings.greedy_codes == "lasso":
        products = products - settings.greedy_l1 * np.abs(products).max(1, keepdims=True)
    warm = supports if supports.shape == products.shape else None
    return kernels.nnls((gram + gram.T) / 2, products, warm_start=warm).codes


def _leading(gram: Array, weights: Array, codes: Array, start: Array) -> tuple[float, Array]:
    """The largest eigenvalue of EᵀCE and its eigenvector, by block power iteration with Rayleigh-Ritz."""
    basis, last = scipy.linalg.qr(start, mode="economic")[0], 0.0
    for _ in range(_STEPS):
        image = gram @ (basis - weights.T @ (codes.T @ basis))
        image -= codes @ (weights @ image)
        values, rotation = scipy.linalg.eigh(basis.T @ image)
        energy, direction = float(values[-1]), basis @ rotation[:, -1]
        if energy - last <= _CONVERGED * energy:
            break
        basis, last = scipy.linalg.qr(image, mode="economic")[0], energy
    return energy, direction * signs(direction[:, None])[0]
