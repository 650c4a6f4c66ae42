"""Ridge regression from sums over tokens, with a ridge that tokens held out choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.statistics.grams import mirrored, upper_gram

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean diagonal of Σ x xᵀ


@dataclass
class Normal:
    """Sums over tokens with inputs x (F) and residuals r (d), in fp64 on the CPU.

    Parameters
    ----------
    upper : torch.Tensor, shape (F, F)
        Σ x xᵀ on the diagonal and above; most of what lies below is zero.
    cross : torch.Tensor, shape (F, d)
        Σ x rᵀ.
    energy : float
        Σ ‖r‖².
    """

    upper: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0

    @staticmethod
    def none(inputs: int, outputs: int) -> Normal:
        """Of no token yet."""
        wide = torch.float64
        return Normal(torch.zeros(inputs, inputs, dtype=wide), torch.zeros(inputs, outputs, dtype=wide))

    def add(self, inputs: torch.Tensor, residuals: torch.Tensor) -> None:
        """Add n tokens: x (n, F) and r (n, d), fp32, anywhere."""
        self.upper += upper_gram(inputs).cpu()
        self.cross += (inputs.mT @ residuals).cpu()
        self.energy += float(torch.linalg.vector_norm(residuals).double().square())

    def merge(self, other: Normal) -> None:
        """Add the sums over other tokens."""
        self.upper += other.upper
        self.cross += other.cross
        self.energy += other.energy

    def error(self, change: torch.Tensor) -> float:
        """Σ ‖r − change ᵀx‖² for a change (F, d)."""
        return self.energy + float(((mirrored(self.upper) @ change - 2 * self.cross) * change).sum())


@dataclass(frozen=True)
class Regressed:
    """What `regress` found.

    Parameters
    ----------
    change : torch.Tensor, shape (F, d), fp64
    ridge : float or None
        Out of `RIDGES`; None where no ridge helps tokens held out, and the change is zero.
    before, after : float
        Σ ‖r‖² of the tokens held out, and with the change.
    """

    change: torch.Tensor
    ridge: float | None
    before: float
    after: float


def regress(fitted: Normal, held: Normal) -> Regressed:
    """argmin over X (F, d) of Σ ‖r − Xᵀx‖² + λ ‖X‖² on the tokens fitted, λ the best of `RIDGES` for those held out.

    With no token fitted, or none held out, nothing changes: what is not judged is not taken.
    """
    best = Regressed(torch.zeros_like(fitted.cross), None, held.energy, held.energy)
    mean = float(fitted.upper.diagonal().mean())
    if not mean > 0 or not held.energy > 0:
        return best
    for ridge in RIDGES:
        square = mirrored(fitted.upper)
        square.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(square)
        if int(failed):
            continue
        change = torch.cholesky_solve(fitted.cross, factor)
        after = held.error(change)
        if after < best.after:
            best = Regressed(change, ridge, held.energy, after)
    return best
