"""The joint objective with the left factors eliminated, its gradient and its curvature (design, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.family import Family
from globe.compute.forms import wide_dtype
from globe.compute.gemm import correlations, grams, matmul, mixtures, scatter_add
from globe.compute.passes import engine, within
from globe.compute.spd import row_basis
from globe.compute.stream import expert_batches
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.statistics.metric import Metric

Array = NDArray[np.float64]
_SKETCH = 16  # random columns of the codes' curvature
_FLOOR = 1e-3  # of an expert's fitted energy: the size of its codes is free, and what they have there is rounding


@dataclass(frozen=True)
class Value:
    """f = Σ_i ‖W'_i − A_i B̃'_i‖² / Σ_i ‖W'_i‖² at its best A_i, and its gradient.

    Parameters
    ----------
    error : float
        f. Where a left factor is `ridged` it is that of the ridged one.
    bank : torch.Tensor, shape (m, r, d), fp32
        ∂f/∂B_j = −2 Σ_i α_ij A_iᵀ R_i L_iᵀ.
    codes : array, shape (N, m)
        ∂f/∂α_ij = −2 ⟨A_iᵀ R_i L_iᵀ, B_j⟩, for all atoms.
    errors : array, shape (N,)
        Every expert's share of f.
    ridged : int
    """

    error: float
    bank: torch.Tensor
    codes: Array
    errors: Array
    ridged: int


@dataclass(frozen=True)
class Curvature:
    """Blocks of the Gauss-Newton matrix of f, A_i having been eliminated.

    Parameters
    ----------
    lefts : torch.Tensor, shape (m, r, r), fp32
        2 Σ_i α_ij² t_i A_iᵀA_i, t_i the mean diagonal of L_i (I − Π_i) L_iᵀ and Π_i the projector on the rows of B̃'_i:
        the atom's block is about this ⊗ `columns`.
    columns : torch.Tensor, shape (d, d), fp64
        Σ_i w_i L_i (I − Π_i) L_iᵀ with w_i = ‖A_i‖², of mean diagonal one.
    codes : torch.Tensor, shape (N, m, m), fp32
        2 ⟨A_i B_j L_i (I − Π_i), A_i B_k L_i (I − Π_i)⟩, from a sketch of its columns, and on its diagonal a little of
        ‖A_i B̃'_i‖² / ‖α_i‖².
    gram : torch.Tensor, shape (r, r), fp64
        The mean of B̃'_i B̃'_iᵀ over its mean diagonal.
    """

    lefts: torch.Tensor
    columns: torch.Tensor
    codes: torch.Tensor
    gram: torch.Tensor


class Problem:
    """The experts of a pool as the metric sees them: W'_i = D_i W_i L_i.

    Parameters
    ----------
    pool : Pool
        Without a metric W'_i = W_i.
    job : Job
        Settings `ridge` and `ridge_rcond`; `blocks.experts` in hand at a time, up to `blocks.cached` bytes of W' are
        kept in memory.
    """

    def __init__(self, pool: Pool, job: Job) -> None:
        self.family, self.metric, self.device = pool.family, pool.metric, job.device
        self._settings, self._blocks = job.settings, job.blocks
        self._rcond = job.settings.ridge_rcond**2  # of fp64, where the setting is for Gram matrices of fp32
        whole = 4 * len(pool.family) * pool.family.p * pool.family.d
        self._cached: list[torch.Tensor] | None = [] if whole <= job.blocks.cached else None
        self._whole = False
        self.energy = 0.0

    def weighted(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """One pass over W'_i, `blocks.experts` at a time."""
        size = self._blocks.experts
        if self._whole and self._cached is not None:
            for numbers in self.family.batches(size):
                yield slice(numbers.start, numbers.stop), self._cached[numbers.start : numbers.stop]
            return
        with engine(self.device) as workers:
            for span, batch in expert_batches(self.family, size, self.device):

                def weigh(part: slice, batch: torch.Tensor = batch, span: slice = span) -> torch.Tensor:
                    if self.metric is not None:
                        return self.metric.weigh(within(span, part), batch[part].float())
                    return batch[part].clone().float()  # the batch's memory is read into again

                found = [matrix for _, weighed in workers.map(weigh, len(batch)) for matrix in weighed]
                if self._cached is not None:
                    self._cached += found
                if not self._whole:
                    norms = torch.stack([torch.linalg.vector_norm(matrix) for matrix in found])
                    self.energy += float(norms.cpu().double().square().sum())
                yield span, found
        self._whole = True

    def evaluate(self, bank: torch.Tensor, codes: Array, advance: Advance) -> Value:
        """f and its gradient at a bank and codes; one pass."""
        return self._pass(bank, codes, advance, None)[0]

    def curvature(self, bank: torch.Tensor, codes: Array, seed: int, advance: Advance) -> tuple[Value, Curvature]:
        """f, its gradient and its curvature; one pass."""
        value, curvature = self._pass(bank, codes, advance, _Gathered(self.family, bank, seed))
        assert curvature is not None
        return value, curvature

    def _pass(
        self, bank: torch.Tensor, codes: Array, advance: Advance, gathered: _Gathered | None
    ) -> tuple[Value, Curvature | None]:
        size = min(self._blocks.experts, len(self.family))
        mixed_room, slope_room, room = (torch.empty(size, *bank.shape[1:], device=self.device) for _ in range(3))
        slope, code_slope = torch.zeros_like(bank), np.zeros_like(codes)
        wide = wide_dtype(self.device)
        errors = torch.zeros(len(self.family), dtype=wide, device=self.device)
        ridged = torch.zeros(len(self.family), dtype=torch.bool, device=self.device)
        with engine(self.device) as workers:
            for span, weighted in self.weighted():
                mixed = mixtures(codes[span], bank, mixed_room)

                def work(
                    part: slice,
                    span: slice = span,
                    mixed: torch.Tensor = mixed,
                    weighted: list[torch.Tensor] = weighted,
                ) -> tuple[torch.Tensor, torch.Tensor, list[_Parts]]:
                    numbers, mine = within(span, part), _together(weighted[part])
                    seen = mixed[part] if self.metric is None else self.metric.seen(numbers, mixed[part])
                    near = seen.isfinite().all(2).all(1)  # else a step far too long
                    seen = torch.where(near[:, None, None], seen, torch.zeros_like(seen))
                    inner, basis, was_ridged = row_basis(seen, self._settings.ridge, self._rcond)
                    fitted = matmul(mine, basis.mT)
                    residual = mine - matmul(fitted, basis)
                    moved = matmul(inner.mT, matmul(fitted.mT.contiguous(), residual))
                    slope_room[part] = moved if self.metric is None else self.metric.unseen(numbers, moved)
                    parts: list[_Parts] = []
                    if gathered is not None:
                        made = zip(matmul(fitted, inner), basis, grams(seen), strict=True)
                        parts = [gathered.parts(k, *three, self.metric) for k, three in enumerate(made, numbers.start)]
                    squares = torch.linalg.vector_norm(residual.flatten(1), dim=1).to(wide).square()
                    return torch.where(near, squares, math.inf), was_ridged & near, parts

                for part, (squares, were_ridged, parts) in workers.map(work, len(weighted)):
                    numbers = within(span, part)
                    errors[numbers], ridged[numbers] = squares, were_ridged
                    for number, some in enumerate(parts, numbers.start):
                        if gathered is not None:
                            gathered.add(number, codes[number], some)
                    advance(part.stop - part.start)
                slopes = slope_room[: len(weighted)]
                code_slope[span] = correlations(slopes, bank)
                scatter_add(codes[span], slopes, slope, room)
        scale = 1 / self.energy if self.energy > 0 else 0.0
        found: Array = errors.cpu().double().numpy()
        value = Value(
            float(found.sum()) * scale,
            slope.mul_(-2 * scale),
            code_slope * (-2 * scale),
            found * scale,
            int(ridged.sum()),
        )
        return value, None if gathered is None else gathered.result(scale)


def _together(matrices: list[torch.Tensor]) -> torch.Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


@dataclass(frozen=True)
class _Parts:
    left_gram: torch.Tensor
    mean: torch.Tensor
    columns: torch.Tensor
    codes: torch.Tensor
    gram: torch.Tensor


class _Gathered:
    """Sums the curvature over experts."""

    def __init__(self, family: Family, bank: torch.Tensor, seed: int) -> None:
        m, r, d = bank.shape
        generator = torch.Generator().manual_seed(seed)
        self._sketch = (torch.randn(d, _SKETCH, generator=generator) / math.sqrt(_SKETCH)).to(bank.device)
        self._bank = bank
        self._lefts = torch.zeros(m, r, r, device=bank.device)
        self._columns = torch.zeros(d, d, dtype=torch.float64)
        self._codes = torch.zeros(len(family), m, m)
        self._gram = torch.zeros(r, r, dtype=torch.float64)

    def parts(
        self, number: int, left: torch.Tensor, basis: torch.Tensor, gram: torch.Tensor, metric: Metric | None
    ) -> _Parts:
        """What an expert adds: Q (r, d) is the orthonormal `basis` of the rows of B̃'_i, so that Π_i = QᵀQ."""
        m, r, d = self._bank.shape
        free = self._sketch - matmul(basis.mT, matmul(basis, self._sketch))
        if metric is not None:
            free = metric.unseen(slice(number, number + 1), free.mT.contiguous()[None])[0].mT.contiguous()
        probed = matmul(self._bank.view(m * r, d), free).view(m, r, _SKETCH)
        moved = matmul(left, probed).flatten(1)
        codes = matmul(moved, moved.mT)
        if metric is None:
            columns = torch.eye(d, device=basis.device) - matmul(basis.mT, basis)
        else:
            hidden = metric.unseen(slice(number, number + 1), basis[None])[0]
            columns = metric.moment(slice(number, number + 1), d)[0] - matmul(hidden.mT, hidden)
        weight = torch.linalg.vector_norm(left).square()
        mean = columns.diagonal().mean().clamp(min=0)
        return _Parts(matmul(left.mT.contiguous(), left), mean, columns * weight, codes, gram)

    def add(self, number: int, codes: NDArray[np.float64], parts: _Parts) -> None:
        gram, mean = parts.gram.cpu().double(), float(parts.mean)
        self._columns += parts.columns.cpu().double()
        self._codes[number] = parts.codes.cpu()
        size = float(np.square(codes).sum())
        if size > 0:
            fitted = float((parts.left_gram.cpu().double() * gram).sum())
            self._codes[number].diagonal().add_(_FLOOR * max(fitted, 0.0) / size)
        size = float(gram.diagonal().mean())
        if size > 0:
            self._gram += gram / size
        for atom in np.flatnonzero(codes):
            self._lefts[atom].add_(parts.left_gram, alpha=float(codes[atom] ** 2 * mean))

    def result(self, scale: float) -> Curvature:
        mean = float(self._columns.diagonal().mean())
        columns = self._columns / mean if mean > 0 else torch.eye(len(self._columns), dtype=torch.float64)
        lefts, codes = self._lefts.mul_(2 * scale), self._codes.mul_(2 * scale)
        return Curvature(lefts, columns, codes, self._gram / len(codes))
