"""Where the joint fit is, and directions from there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import inner_products

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Vector:
    """A direction or a slope: a part for the bank (m, r, d; fp32) and one for the codes' variables (N, m; fp64).

    With several ranks that for the bank has this rank's atoms.
    """

    bank: torch.Tensor
    codes: Array

    def dot(self, other: Vector) -> float:
        """The inner product."""
        of_bank = float(inner_products(self.bank, other.bank).sum())
        of_codes = float((self.codes * other.codes).sum()) if ranks.rank() == 0 or ranks.size() == 1 else 0.0
        return ranks.added(of_bank + of_codes)

    def scale_(self, factor: float) -> Vector:
        """This vector times `factor`, the bank in place."""
        return Vector(self.bank.mul_(factor), self.codes * factor)

    def add_(self, other: Vector, factor: float) -> Vector:
        """This vector plus `factor` times the other, the bank in place."""
        return Vector(self.bank.add_(other.bank, alpha=factor), self.codes + factor * other.codes)


@dataclass(frozen=True)
class Point:
    """A bank and codes. The codes' variables are the codes where `signed`, else their roots on the support."""

    bank: torch.Tensor
    codes: Array
    signed: bool

    @property
    def variables(self) -> Array:
        """What the codes are functions of."""
        return self.codes if self.signed else np.sqrt(self.codes)

    @property
    def chain(self) -> Array:
        """Derivatives of the codes by their variables; zero off the support of non-negative codes, which stays."""
        return np.ones_like(self.codes) if self.signed else 2 * np.sqrt(self.codes)

    def moved(self, direction: Array, size: float) -> Array:
        """The codes `size` times a direction of their variables away."""
        variables = self.variables + size * direction
        return variables if self.signed else variables**2
