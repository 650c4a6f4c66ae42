"""The problem of nnls in variables of equal size, as cpp/src/nnls_scale.cpp has it.

With G_jj = ‖a_j‖², the code of atom j is q_j y_j, where q_j is the power of two nearest to max ‖a‖ / ‖a_j‖ from below.
The Gram matrix of y has a diagonal within a factor of four of its largest entry, which is brought near one
where it is far from that. Powers of two round nothing, so the solution is the same, bit for bit, whatever powers of two the atoms are multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NEAR = 64  # exponents of a diagonal that may stay as it is
FARTHEST = 1000  # exponent of the largest weight, so that weights stay finite
DEEPEST_LIFT = 40
POLISH_BEYOND = 10  # exponent of a weight from which the lift costs too many digits
CONVEX = 1.0 + 1e-6
HUGE = 1e100  # what is scaled is of size 1, but for a Gram matrix that is none


@dataclass(frozen=True)
class ScaledGram:
    """A Gram matrix in scaled variables, and how to get there."""

    gram: Floats
    lifted: Floats
    """What is factored. Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant; adding it on the simplex makes the matrix definite wherever
    the solution is unique. Not a ridge. s lies between the largest and the smallest entry of the diagonal, so that neither
    drowns in the other."""
    weights: Floats
    """q, all at least 1."""
    norms: Floats
    """Roots of the scaled diagonal."""
    unit: int
    """Exponent of what multiplies the largest atom."""
    exponents: NDArray[np.int64]
    """Of what multiplies each atom: weights and unit."""
    lift: float
    """s in scaled variables; 0 without simplex."""
    indefinite: bool
    """An entry exceeds what the Cauchy-Schwarz inequality allows."""

    @property
    def polished(self) -> bool:
        """Whether solutions of lifted systems are refined."""
        return self.lift > 0.0 and bool(self.weights.max() > 2.0**POLISH_BEYOND)


def scale(gram: Floats, simplex: bool) -> ScaledGram:
    """Scale a matrix of finite entries with a diagonal of at least 0."""
    diagonal = gram.diagonal()
    fractions, powers = (part.astype(kind) for part, kind in zip(np.frexp(diagonal), (float, np.int64), strict=True))
    first = int(np.argmax(diagonal))
    positive = diagonal > 0.0
    farther = (powers[first] - powers - (fractions[first] < fractions)) >> 1
    farther = np.where(positive, np.minimum(farther, FARTHEST), 0)
    unit = -((int(powers[first]) - 1) // 2) if abs(int(powers[first])) > NEAR else 0
    exponents = farther + unit
    factors, weights = np.ldexp(1.0, exponents), np.ldexp(1.0, farther)
    with np.errstate(over="ignore"):
        scaled = np.clip(gram * factors[:, None] * factors, -HUGE, HUGE)
    norms = np.where(positive, np.sqrt(np.abs(scaled.diagonal())), 0.0)
    half_a_denormal = np.ldexp(1.0, exponents - 535)
    limit = CONVEX * np.outer(norms, norms) + np.outer(half_a_denormal, half_a_denormal)
    indefinite = bool((np.abs(scaled) > limit).any())
    lift = 0.0
    if simplex:
        lift = float(np.ldexp(norms.max() ** 2 or 1.0, -min(int(farther.max()), DEEPEST_LIFT)))
    lifted = scaled + lift * np.outer(weights, weights) if simplex else scaled
    return ScaledGram(scaled, lifted, weights, norms, unit, exponents, lift, indefinite)


def scale_row(scaled: ScaledGram, correlations: Floats, l1: float) -> tuple[Floats, int, Floats]:
    """The scaled right-hand side, the exponent of the row's codes, and c − l1 as the largest atom has it."""
    with np.errstate(over="ignore", invalid="ignore"):
        side, exponent = correlations - l1, 0
        result = side * np.ldexp(1.0, scaled.exponents)
    size = np.abs(result).max()
    if size == 0.0 or 1.0 / HUGE < size < HUGE:
        return result, 0, result / scaled.weights
    if not np.isfinite(side).all():
        side, exponent = 0.5 * correlations - 0.5 * l1, 1
    powers = np.where(side != 0.0, np.frexp(side)[1] + scaled.exponents, np.iinfo(np.int64).min)
    exponent += int(powers.max())
    result = np.ldexp(side, scaled.exponents - int(powers.max()))
    return result, exponent, result / scaled.weights


def scale_simplex_row(scaled: ScaledGram, correlations: Floats) -> tuple[Floats, int, Floats, bool]:
    """The scaled right-hand side, zero at the best vertex, that vertex, c, and whether c dwarfs the Gram matrix."""
    unit = 2.0**scaled.unit
    with np.errstate(over="ignore"):
        side = correlations * unit * unit
    dwarfs = bool(np.abs(side).max() > HUGE)
    side = np.clip(side, -HUGE, HUGE)
    vertex = int(np.argmin(0.5 * np.square(scaled.norms / scaled.weights) - side))
    # The multiplier absorbs any constant in c; taking it out first avoids cancellation.
    with np.errstate(over="ignore"):
        result = np.maximum((side - side[vertex]) * scaled.weights, -HUGE * HUGE)
    return result, vertex, side, dwarfs
