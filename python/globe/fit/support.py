"""Which atoms an expert uses in the joint fit: let in by a Newton step, put out by the temperature of entmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.compute.codes import supports
from globe.fit.codes import TEMPERATURE_BOUNDS
from globe.settings import Settings

Array = NDArray[np.float64]
_DAMPING = 1e-3  # of the mean diagonal


@dataclass(frozen=True)
class Quadratic:
    """gᵢᵀ(α_i − α⁰_i) + ½ (α_i − α⁰_i)ᵀ H_i (α_i − α⁰_i), for every expert.

    Parameters
    ----------
    curvature : torch.Tensor, shape (N, m, m)
        H.
    codes, slope : array, shape (N, m)
        α⁰ and g.
    """

    curvature: torch.Tensor
    codes: Array
    slope: Array


def above_target(codes: Array, settings: Settings) -> bool:
    """Whether supports are to shrink to the target: of entmax and sparsemax, where their median is above it."""
    return settings.codes in ("entmax", "sparsemax") and bool(np.median(supports(codes)) > settings.support)


def newton_codes(model: Quadratic) -> Array:
    """argmin over α_i ≥ 0 of a quadratic model, for every expert, over all atoms."""
    found = np.empty_like(model.codes)
    for number, block in enumerate(model.curvature):
        damped = _damped(block)
        target = damped @ model.codes[number] - model.slope[number]
        found[number] = kernels.nnls(damped, target[None]).codes[0]
    return np.where(found.max(1, keepdims=True) > 0, found, model.codes)


def shrink_support(model: Quadratic, grown: Array, wanted: float, alpha: float) -> tuple[Array, float]:
    """Codes of a median support of at most `wanted`, and the temperature that leaves it.

    The logits are those of what each atom contributes, α_ij √H_i,jj: entmax(z/T) keeps the larger contributions, the
    fewer the lower T is. The values of those kept are refitted to the quadratic model.

    Parameters
    ----------
    model : Quadratic
    grown : array, shape (N, m)
        The codes to choose from.
    wanted : float
    alpha : float
        Of entmax.
    """
    weights = np.sqrt(np.maximum(torch.diagonal(model.curvature, dim1=1, dim2=2).double().numpy(), 0))
    contributions = grown * weights
    contributions = np.where(contributions.max(1, keepdims=True) > 0, contributions, grown)
    logits = kernels.entmax_inverse(contributions / contributions.sum(1, keepdims=True), alpha)
    low, high = TEMPERATURE_BOUNDS[0], 1.0
    for _ in range(40):
        middle = np.sqrt(low * high)
        if _median(kernels.entmax(logits, alpha, temperature=middle)) > wanted:
            high = middle
        else:
            low = middle
    kept = (kernels.entmax(logits, alpha, temperature=low) > 0) & (grown > 0)
    found = np.zeros_like(model.codes)
    for number, block in enumerate(model.curvature):
        damped, some = _damped(block), np.flatnonzero(kept[number])
        target = (damped @ model.codes[number] - model.slope[number])[some]
        inner = np.ascontiguousarray(damped[np.ix_(some, some)])
        found[number, some] = kernels.nnls(inner, target[None]).codes[0]
    return np.where(found.max(1, keepdims=True) > 0, found, np.where(kept, grown, 0.0)), float(low)


def _median(codes: Array) -> float:
    return float(np.median(np.count_nonzero(codes, axis=1)))


def _damped(block: torch.Tensor) -> Array:
    dense: Array = block.double().numpy()
    return dense + _DAMPING * max(float(np.trace(dense)) / len(dense), 1e-300) * np.eye(len(dense))
