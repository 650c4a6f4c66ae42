"""Vectors of a bank and codes, L-BFGS on them, and the preconditioner of the joint fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.gemm import matmul
from globe.compute.spd import spd_inverse
from globe.fit.variable_projection import Curvature, Value

Array = NDArray[np.float64]

_LEFT_DAMPING = 1e-4  # of the mean diagonal of an atom's left block
_COLUMN_DAMPING = 1e-3
_CODE_DAMPING = 1e-2
_REACH = 2.0  # of the size of a bank or an expert's variables, in one step
_FIRST_STEP = 0.5  # of the block-diagonal Newton step, before a pair tells


@dataclass(frozen=True)
class Vector:
    """A direction or a slope: a part for the bank (m, r, d; fp32 or bf16) and one for the codes' variables (N, m)."""

    bank: torch.Tensor
    codes: Array

    def dot(self, other: Vector) -> float:
        """The inner product: of an atom in fp32, summed in fp64."""
        products = (
            torch.dot(a.flatten().float(), b.flatten().float()) for a, b in zip(self.bank, other.bank, strict=True)
        )
        return float(sum(float(product) for product in products)) + float((self.codes * other.codes).sum())

    def copy(self) -> Vector:
        """The vector in memory of its own, its bank in fp32."""
        return Vector(self.bank.clone().float(), self.codes)

    def rounded(self) -> Vector:
        """The vector with its bank in bf16."""
        return Vector(self.bank.bfloat16(), self.codes)

    def mul_(self, factor: float) -> Vector:
        """The vector scaled, the bank in place."""
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

    def slope(self, value: Value) -> Vector:
        """The gradient of the objective in bank and variables."""
        return Vector(value.bank, value.codes * self.chain)

    def reach(self, direction: Vector) -> float:
        """The part of a direction, at most 1, along which neither the bank nor any expert's variables triple."""
        sizes = np.linalg.norm(self.variables, axis=1), np.linalg.norm(direction.codes, axis=1)
        bank, step = (float(torch.linalg.vector_norm(part)) for part in (self.bank, direction.bank))
        parts = [_REACH * sizes[0] / np.maximum(sizes[1], 1e-300), np.array([_REACH * bank / max(step, 1e-300)])]
        return float(min(1.0, *(part.min() for part in parts)))

    def moved(self, direction: Vector, size: float, gone: float = 0.0) -> Point:
        """The point `size` times the direction away, its bank in this one's memory, which is `gone` times away now."""
        variables = self.variables + size * direction.codes
        bank = self.bank.add_(direction.bank, alpha=size - gone)
        return Point(bank, variables if self.signed else variables**2, self.signed)


class Pairs:
    """The last pairs of differences of points and slopes, at most `most`; their banks are kept in bf16."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.steps: list[Vector] = []
        self.slopes: list[Vector] = []

    def __len__(self) -> int:
        return len(self.steps)

    def clear(self) -> None:
        """Forget all pairs."""
        self.steps.clear()
        self.slopes.clear()

    def add(self, step: Vector, slope: Vector) -> None:
        """Remember a pair, unless its curvature is not positive."""
        curvature = step.dot(slope)
        if not curvature > 1e-10 * np.sqrt(step.dot(step) * slope.dot(slope)):
            return
        if len(self.steps) == self.most:
            del self.steps[0], self.slopes[0]
        self.steps.append(step.rounded())
        self.slopes.append(slope.rounded())

    def direction(self, slope: Vector, precondition: Callable[[Vector], Vector]) -> Vector:
        """−H g with H from the pairs on top of the preconditioner (Nocedal & Wright, 2006, algorithm 7.4).

        The preconditioner may take the memory of what it is given.
        """
        pairs = list(zip(self.steps, self.slopes, strict=True))
        scale = _FIRST_STEP
        if pairs:
            step, change = pairs[-1]
            scale = step.dot(change) / change.dot(precondition(change.copy()))
        result = slope.copy()
        weights = []
        for step, change in reversed(pairs):
            weight = step.dot(result) / step.dot(change)
            weights.append(weight)
            result = result.add_(change, -weight)
        result = precondition(result).mul_(scale)
        for (step, change), weight in zip(pairs, reversed(weights), strict=True):
            back = change.dot(result) / step.dot(change)
            result = result.add_(step, weight - back)
        return result.mul_(-1.0)

    def move(self, forward: torch.Tensor, backward: torch.Tensor) -> None:
        """Change coordinates: steps by Q from the left, slopes by Q⁻ᵀ; both (r, r)."""
        for vectors, factor in ((self.steps, forward), (self.slopes, backward)):
            for vector in vectors:
                move_atoms(vector.bank, factor)

    def resize(self, factors: Array) -> None:
        """Change coordinates of the codes' variables: steps times the factors (N, 1), slopes divided by them."""
        self.steps = [Vector(step.bank, step.codes * factors) for step in self.steps]
        self.slopes = [Vector(slope.bank, slope.codes / factors) for slope in self.slopes]


def move_atoms(bank: torch.Tensor, factor: torch.Tensor) -> None:
    """Q X_j for every atom of a bank (m, r, d; fp32 or bf16), in place."""
    for atom in bank:
        atom.copy_(matmul(factor, atom.float()))


class Preconditioner:
    """The inverse of the block-diagonal Gauss-Newton matrix: lefts_j ⊗ columns for an atom, (m, m) for an expert."""

    def __init__(self, curvature: Curvature, weigh_columns: bool) -> None:
        device = curvature.lefts.device
        self._lefts, self._codes, self._columns = curvature.lefts, curvature.codes, None
        for left in self._lefts:  # the inverse takes its memory
            damped = _LEFT_DAMPING * left.diagonal().mean()
            left.diagonal().add_(torch.where(damped > 0, damped, torch.ones_like(damped)))
            left.copy_(spd_inverse(left[None], 1e-6, 1e-12)[0][0])
        if weigh_columns:
            values, vectors = torch.linalg.eigh(curvature.columns)
            inverse = (vectors / (values.clamp(min=0) + _COLUMN_DAMPING)) @ vectors.T
            self._columns = inverse.float().to(device)

    def __call__(self, vector: Vector, point: Point) -> Vector:
        """The inverse applied to a slope at a point; takes the memory of the slope's bank, in fp32."""
        for atom, left in zip(vector.bank, self._lefts, strict=True):
            moved = matmul(left, atom)
            atom.copy_(moved if self._columns is None else matmul(moved, self._columns))
        codes = np.zeros_like(vector.codes)
        for number, chain in enumerate(point.chain):
            active = np.flatnonzero(chain)
            block = self._codes[number].double().numpy()[np.ix_(active, active)] * np.outer(
                chain[active], chain[active]
            )
            mean = np.trace(block) / max(len(active), 1)
            if mean > 0:
                block[np.diag_indices_from(block)] += _CODE_DAMPING * mean
                codes[number, active] = np.linalg.solve(block, vector.codes[number, active])
        return Vector(vector.bank, codes)
