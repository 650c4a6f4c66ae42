"""What an expert's own inputs change in the factor of its layer's second moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from globe.compute.gemm import matmul


@dataclass(frozen=True)
class OwnColumns:
    """R_i = I + U_i ((I + Λ_i)^½ − I) U_iᵀ of experts, so that L R_i (L R_i)ᵀ = L (I + U_i Λ_i U_iᵀ) Lᵀ.

    Parameters
    ----------
    directions : torch.Tensor, shape (N, d, k)
        U_i, with orthonormal columns.
    values : torch.Tensor, shape (N, k)
        Λ_i, above −1; zero where an expert is as its layer.
    """

    directions: torch.Tensor
    values: torch.Tensor

    def times(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """X_i R_i of X (n, k, d); R_i is symmetric."""
        directions, stretch = self.directions[some], (1 + self.values[some]).sqrt() - 1
        return matrices + matmul(matmul(matrices, directions) * stretch[:, None], directions.mT)

    def beyond(self, some: slice, factor: torch.Tensor) -> torch.Tensor:
        """L U_i Λ_i U_iᵀ Lᵀ (n, d, d), what L R_i R_iᵀ Lᵀ has beyond L Lᵀ, for L (d, d)."""
        moved = matmul(factor, self.directions[some])
        return matmul(moved * self.values[some][:, None], moved.mT)

    def gains(self, some: slice, factor: torch.Tensor) -> torch.Tensor:
        """The traces (n,) of `beyond`."""
        return (matmul(factor, self.directions[some]).square().sum(1) * self.values[some]).sum(1)

    def summed(self, numbers: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
        """Σ_i w_i U_i Λ_i U_iᵀ (d, d) of experts of these numbers, in the dtype of w (n,) and where that lies."""
        there, dtype = weights.device, weights.dtype
        directions, values = (found[numbers].to(there).to(dtype) for found in (self.directions, self.values))
        moved = directions * (weights[:, None] * values)[:, None]
        return moved.movedim(1, 0).flatten(1) @ directions.movedim(1, 0).flatten(1).mT
