"""The problem of nnls in variables of equal size, as cpp/src/nnls_scale.cpp has it.

With G_jj = ‖a_j‖², the code of atom j is q_j y_j, where q_j is the power of two nearest to max ‖a‖ / ‖a_j‖ from below.
The Gram matrix of y has a diagonal within a factor of four of its largest entry, which is brought near one where it is
far from that. Powers of two round nothing.
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
    """What is factored. Σα = 1 makes ½ αᵀ(s 11ᵀ)α a constant; adding it on the simplex makes the matrix definite
    wherever the solution is unique. Not a ridge. s lies between the largest and the smallest entry of the diagonal, so
    that neither drowns in the other."""
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
    fractions, powers = np.frexp(diagonal)
    first = int(np.argmax(diagonal))
    positive = diagonal > 0.0
    farther = (powers[first] - powers - (fractions[first] < fractions)) >> 1
    farther = np.where(positive, np.minimum(farther, FARTHEST), 0)
    unit = -((int(powers[first]) - 1) // 2) if abs(int(powers[first])) > NEAR else 0
    exponents = farther + unit
    factors, weights = np.ldexp(1.0, exponents), np.ldexp(1.0, farther)
    scaled = gram
    if exponents.any():
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


@dataclass(frozen=True)
class ScaledRows:
    """Right-hand sides in scaled variables, one entry per row."""

    sides: Floats
    exponents: NDArray[np.int64]
    """Of the codes, besides the atoms' own."""
    sizes: Floats
    """Largest |c − l1|, as the largest atom has it."""
    vertices: NDArray[np.int64]
    """On the simplex, the best single atom; its right-hand side is zero."""
    overflows: NDArray[np.bool_]
    """On the simplex, whether c is too large beside the Gram matrix."""


def scale_rows(scaled: ScaledGram, correlations: Floats, l1: float) -> ScaledRows:
    """Scale right-hand sides; on the simplex l1 is 0."""
    n = len(correlations)
    exponents, vertices, overflows = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    unit = 2.0**scaled.unit
    with np.errstate(over="ignore", invalid="ignore"):
        if scaled.lift > 0.0:
            sides = correlations * unit * unit
            sizes = np.abs(sides).max(axis=1)
            overflows = sizes > HUGE
            if overflows.any():
                sides, sizes = np.clip(sides, -HUGE, HUGE), np.minimum(sizes, HUGE)
            vertices = np.argmin(0.5 * np.square(scaled.norms / scaled.weights) - sides, axis=1)
            # The multiplier absorbs any constant in c; taking it out first avoids cancellation.
            sides = (sides - np.take_along_axis(sides, vertices[:, None], axis=1)) * scaled.weights
            return ScaledRows(np.maximum(sides, -HUGE * HUGE), exponents, sizes, vertices, overflows)
        sides = correlations - l1
        sizes = np.abs(sides).max(axis=1) * unit
        if scaled.exponents.any():
            sides = sides * np.ldexp(1.0, scaled.exponents)
        extreme = ~((1.0 / HUGE < sizes) & (sizes * scaled.weights.max() < HUGE)) & (sizes != 0.0)
    for row in np.flatnonzero(extreme):
        sides[row], exponents[row] = _scale_extreme(scaled, correlations[row], l1)
        sizes[row] = np.abs(sides[row] / scaled.weights).max()
    return ScaledRows(sides, exponents, sizes, vertices, overflows)


def _scale_extreme(scaled: ScaledGram, correlations: Floats, l1: float) -> tuple[Floats, int]:
    """Bring a right-hand side near one, whose largest entry is far from that or beyond the range."""
    with np.errstate(over="ignore"):
        side, exponent = correlations - l1, 0
    if not np.isfinite(side).all():
        side, exponent = 0.5 * correlations - 0.5 * l1, 1
    powers = (np.frexp(side)[1] + scaled.exponents)[side != 0.0]
    most = int(powers.max()) if len(powers) else 0
    return np.ldexp(side, scaled.exponents - most), most + exponent
