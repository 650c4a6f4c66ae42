"""The preconditioner of a Gauss-Newton step: every atom's own block, and how atoms are coupled."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import lower_times, matmul
from globe.compute.passes import Engine
from globe.compute.spd import ridged_factor, spd_factor_inverse
from globe.fit.objective import Value
from globe.fit.point import Point

Array = NDArray[np.float64]
_LEFT_DAMPING = 1e-4  # of the mean diagonal of an atom's left block
_COUPLING_DAMPING = 1e-2
_COLUMN_DAMPING = 1e-3
_CODE_DAMPING = 1e-2


class Preconditioner:
    """(S (R ⊗ I) Sᵀ ⊗ K)⁻¹ for the bank and inverse blocks for the codes, S Sᵀ the block diagonal of the atoms.

    S_j S_jᵀ = 2 Σ_i α_ij² t_i C_i; R_jk = Σ_i w_i α_ij α_ik of unit diagonal with w_i = t_i tr C_i, which for
    non-negative codes is far from the identity; K is the mean of the K_i.

    Parameters
    ----------
    value : Value
    point : Point
        The value's.
    weigh_columns : bool
        Whether K is not the identity.
    workers : Engine

    With several ranks each has some of the atoms, and what is multiplied are those.
    """

    def __init__(self, value: Value, point: Point, weigh_columns: bool, workers: Engine) -> None:
        lefts, device = value.lefts, value.bank.device
        mean = lefts.diagonal(dim1=1, dim2=2).mean(1)
        damped = torch.where(mean > 0, _LEFT_DAMPING * mean, torch.ones_like(mean))
        lefts.diagonal(dim1=1, dim2=2).add_(damped[:, None])

        def invert(part: slice) -> None:
            lefts[part] = spd_factor_inverse(lefts[part], 1e-6, 1e-12)

        workers.run(invert, len(lefts))
        self._inner, self._workers = lefts, workers
        coupling = _inverse_coupling(value.weights, point.codes)
        self._coupling = torch.from_numpy(coupling.astype(np.float32)).to(device)
        self._columns: torch.Tensor | None = None
        if weigh_columns:
            inverse = torch.cholesky_inverse(ridged_factor(value.columns, _COLUMN_DAMPING))
            self._columns = inverse.float().to(device)
        self._codes = _code_blocks(value.curvature, point.chain)

    def bank(self, slope: torch.Tensor) -> torch.Tensor:
        """The inverse times the bank's part (m, r, d)."""
        found = torch.empty_like(slope)

        def whiten(part: slice) -> None:
            found[part] = lower_times(self._inner[part], slope[part])

        def colour(part: slice) -> None:
            moved = matmul(self._inner[part].mT, found[part])
            found[part] = moved if self._columns is None else matmul(moved, self._columns)

        self._workers.run(whiten, len(found))
        columns = ranks.by_columns(found, len(self._coupling))
        for part in columns.split(1 << 20, 1):
            part.copy_(self._coupling @ part)
        found = ranks.by_atoms(columns, found)
        self._workers.run(colour, len(found))
        return found

    def codes(self, slope: Array) -> Array:
        """The inverse times the codes' part (N, m)."""
        found: Array = np.matmul(self._codes, slope[:, :, None])[:, :, 0]
        return found


def _inverse_coupling(weights: Array, codes: Array) -> Array:
    """(R + damping)⁻¹ (m, m)."""
    products = codes.T @ (weights[:, None] * codes)
    sizes = np.sqrt(np.diag(products))
    sizes = np.where(sizes > 0, sizes, 1.0)
    coupling = products / sizes[:, None] / sizes
    np.fill_diagonal(coupling, 1 + _COUPLING_DAMPING)
    return np.asarray(np.linalg.inv(coupling), np.float64)


def _code_blocks(curvature: torch.Tensor, chain: Array) -> Array:
    """Inverse blocks (N, m, m) in the codes' variables, damped; zero where a code has no variable."""
    blocks = np.zeros(curvature.shape)
    for number, (block, slopes) in enumerate(zip(curvature, chain, strict=True)):
        active = np.flatnonzero(slopes)
        inner = block.double().numpy()[np.ix_(active, active)] * np.outer(slopes[active], slopes[active])
        mean = np.trace(inner) / max(len(active), 1)
        if mean > 0:
            inner[np.diag_indices_from(inner)] += _CODE_DAMPING * mean
            blocks[number][np.ix_(active, active)] = np.linalg.inv(inner)
    return blocks
