"""Codes: non-negative, sparse, from a small Gram and correlations alone (specification, G and H.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from globe import kernels
from globe.compute.codes import never_empty, supports
from globe.settings import Settings

Array = NDArray[np.float64]

TEMPERATURE_BOUNDS = (1e-3, 1e3)


@dataclass(frozen=True)
class Coding:
    """Codes α (n, m).

    `logits` are the z (n, m) with entmax(z/T) = α for entmax and sparsemax, else None. `irregular` counts the
    experts whose least squares problem was singular (atoms were set aside) or did not converge.
    """

    codes: Array
    logits: Array | None
    irregular: int


def one_atom_each(codes: Array) -> bool:
    """Whether no expert has two of several atoms, so that codes are `spread` before a fit."""
    return codes.shape[1] > 1 and bool(supports(codes).max() == 1)


def spread(codes: Array, others: int, size: float, seed: int) -> Array:
    """Codes to start a fit from where every expert has but one atom: some `others` more, and their weights, by chance.

    Weights are up to `size` times that of the expert's own atom.

    From one atom each a fit makes no headway. In the loops the targets A_i⁺W_i of a group of experts with the same
    mixture are that mixture, and the rest, which their dictionary step would need, is what no other atom explains; the
    joint fit keeps to the atoms that an expert has.
    """
    experts, atoms = codes.shape
    random = np.random.default_rng(seed)
    strangers = random.random(codes.shape)
    strangers[codes > 0] = np.inf
    chosen = np.argsort(strangers, axis=1)[:, : min(atoms - 1, others)]
    mixed = codes.copy()
    mixed[np.arange(experts)[:, None], chosen] = size * random.random(chosen.shape) * codes.max(1, keepdims=True)
    return mixed


def coding_step(gram: Array, correlations: Array, settings: Settings, temperature: float) -> Coding:
    """Code targets on the bank: argmin over α_i of ‖T_i − Σ_j α_ij B_j‖² in the form `settings.codes`.

    entmax and sparsemax: the NNLS codes, on the simplex, are turned into logits by inverting entmax on the
    support. α = entmax(z/T) chooses the support, the values on it are refitted, and the logits are re-derived.
    At T = 1 the NNLS codes come back unchanged, and at any higher T too: no further atom lowers the error.

    Parameters
    ----------
    gram : array, shape (m, m)
        ⟨B_j, B_k⟩.
    correlations : array, shape (n, m)
        ⟨T_i, B_j⟩.
    settings : Settings
        `codes`, `entmax_alpha`, `epsilon`, `l1`.
    temperature : float
        T of entmax and sparsemax.
    """
    if settings.codes == "nnls":
        penalty = settings.l1 * np.abs(correlations).max(1, keepdims=True)
        solved = kernels.nnls(gram, correlations - penalty)
        codes = never_empty(solved.codes, correlations)
        return Coding(prune(codes, settings.epsilon), None, int(np.count_nonzero(solved.status)))
    if settings.codes == "simplex":
        solved = kernels.nnls(gram, correlations, simplex=True)
        codes = prune(solved.codes, settings.epsilon)
        return Coding(codes / codes.sum(1, keepdims=True), None, int(np.count_nonzero(solved.status)))
    if settings.codes == "signed":
        return Coding(prune(_least_squares(gram, correlations), settings.epsilon), None, 0)
    alpha = entmax_alpha(settings)
    solved = kernels.nnls(gram, correlations)
    dense = never_empty(solved.codes, correlations)
    scale = dense.sum(1, keepdims=True)
    logits = kernels.entmax_inverse(dense / scale, alpha)
    chosen = kernels.entmax(logits, alpha, temperature=temperature, epsilon=settings.epsilon) > 0
    codes = prune(_refit(gram, correlations, chosen & (dense > 0)), settings.epsilon)
    codes = codes / codes.sum(1, keepdims=True)
    logits = kernels.entmax_inverse(codes, alpha, temperature=temperature)
    return Coding(codes, logits, int(np.count_nonzero(solved.status)))


def entmax_alpha(settings: Settings) -> float:
    """α of the settings' map: sparsemax is entmax with α = 2."""
    return 2.0 if settings.codes == "sparsemax" else settings.entmax_alpha


def prune(codes: Array, epsilon: float) -> Array:
    """Drop the codes below ε times the sum of their expert's (specification, I), by size; the largest is kept."""
    sizes = np.abs(codes)
    kept = (sizes >= epsilon * sizes.sum(1, keepdims=True)) | (sizes == sizes.max(1, keepdims=True))
    return np.where(kept, codes, 0.0)


def update_temperature(temperature: float, median_support: float, target: float, rate: float) -> float:
    """T ← T exp(−η (median |supp| / s_tgt − 1)), within TEMPERATURE_BOUNDS.

    The specification (H.4) prints a plus sign, which runs away: α = entmax(z/T) has the larger support the
    larger T is, so a support above its target must lower T.
    """
    low, high = TEMPERATURE_BOUNDS
    return min(high, max(low, temperature * math.exp(-rate * (median_support / target - 1))))


def _least_squares(gram: Array, correlations: Array) -> Array:
    """Signed codes; where atoms are dependent, those of least norm."""
    codes: Array = correlations @ scipy.linalg.pinvh(gram)
    return codes


def _refit(gram: Array, correlations: Array, chosen: NDArray[np.bool_]) -> Array:
    codes = np.zeros_like(correlations)
    for number, mask in enumerate(chosen):
        support = np.flatnonzero(mask)
        fitted = kernels.nnls(gram[np.ix_(support, support)], correlations[None, number, support])
        codes[number, support] = fitted.codes[0]
    return never_empty(codes, correlations)


def unit_codes(codes: Array) -> Array:
    """Codes of absolute sum one: f does not depend on the size of α_i."""
    size: Array = np.abs(codes).sum(1, keepdims=True)
    found: Array = codes / np.where(size > 0, size, 1.0)
    return found
