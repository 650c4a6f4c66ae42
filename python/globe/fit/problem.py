"""Passes over the experts of a pool at a bank and codes: the joint objective, and what its curvature needs of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.forms import per_core, wide_dtype
from globe.compute.gemm import matmul, mixtures, solver_dtype, weighted_sum
from globe.compute.passes import engine, shifted, within
from globe.compute.shelf import Shelves
from globe.compute.spd import row_basis
from globe.compute.stream import expert_batches
from globe.fit.dictionary import spans
from globe.fit.objective import Part, Sums, Value
from globe.fit.sketch import Sketch
from globe.fit.support import above_target
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.sizes.flops import SAMPLED, SKETCHED, keeps_columns

Array = NDArray[np.float64]
_SMALL_ERROR = 1e-3  # of ‖W'‖²: below it the difference of squares in fp32 loses too many digits


class Problem:
    """The experts of a pool that are this rank's as the metric sees them, and what the last pass left of each.

    They are seen as W'_i = D_i W_i L_i; what a pass sums is over the experts of all ranks.

    Parameters
    ----------
    pool : Pool
        Without a metric W'_i = W_i.
    shape : tuple of int
        (m, r, d) of the bank.
    job : Job
        Settings `ridge` and `ridge_rcond`; `blocks.experts` in hand at a time, up to `blocks.cached` bytes kept.
    folder : Path
        For what is more than that.

    Attributes
    ----------
    kept : torch.dtype
        Of both shelves, and so of what conjugate gradients multiply. K_i is what is left of L_i L_iᵀ, so that rounding
        it is harmless; rounding a basis is not, and it stays in fp32.
    lefts : Shelf
        C_i = A_iᵀA_i (r × r).
    hidden : Shelf
        K_i = L_i (I − Π_i) L_iᵀ (d × d), Π_i the projector on the rows of B̃'_i, where `whole`; otherwise an
        orthonormal basis of these rows (r × d). K_i takes fewer products where there is a metric, and no more memory
        than a few times the basis where d ≤ 2 r.
    made : bool
        Whether W'_i of all experts are at hand, as they are after the first pass.
    """

    def __init__(self, pool: Pool, shape: tuple[int, int, int], job: Job, folder: Path) -> None:
        self.family, self.metric, self.device = pool.family, pool.metric, job.device
        self._settings = job.settings
        self._rcond = job.settings.ridge_rcond**2  # of fp64, where the setting is for Gram matrices of fp32
        (_, r, d), count, p = shape, len(pool.family), pool.family.p
        mine = ranks.dealt(pool.family)
        self.at_once = min(job.blocks.experts, max(1, mine.stop - mine.start))
        self.spans = [shifted(some, mine.start) for some in spans(mine.stop - mine.start, self.at_once)]
        self.whole = keeps_columns(pool.metric is not None, r, d)
        self.kept = solver_dtype(job.settings.precision, job.device) if self.whole else torch.float32
        self._stride = max(1, count // SAMPLED)
        shelves = Shelves(job.device, job.blocks.cached, folder)
        held, self._mine = mine.stop - mine.start, mine
        self.lefts = shelves.make((held, r, r), mine.start, self.kept)
        self.hidden = shelves.make((held, d if self.whole else r, d), mine.start, self.kept)
        self._weighted = shelves.make((held, p, d), mine.start)
        self.made = False
        self._moments: dict[int | None, torch.Tensor] = {}
        if self.whole and pool.metric is not None:
            with engine(job.device) as workers:
                self._moments = pool.metric.layer_moments(workers)

    def look(self, bank: torch.Tensor, codes: Array, seed: int | None, advance: Advance) -> Value:
        """f, its gradient and its curvature at a bank and codes; one pass. `seed` draws the columns of the sketch.

        Without a seed f and the mean Gram matrix alone: the rest is zero, and nothing is kept of the experts.
        """
        return self.sums(bank, codes, seed, advance).over_ranks(seed is not None).value()

    def sums(self, bank: torch.Tensor, codes: Array, seed: int | None, advance: Advance) -> Sums:
        """What `look` comes from, of this rank's experts."""
        sums, size = Sums.none(bank, codes), self.at_once
        mixed_room, slope_room = (torch.empty(size, *bank.shape[1:], device=self.device) for _ in range(2))
        left_room = torch.empty(size, *sums.lefts.shape[1:], device=self.device)
        hidden_room = torch.empty(size, bank.shape[2 if self.whole else 1], bank.shape[2], device=self.device)
        free_room = torch.empty(size, bank.shape[2], SKETCHED, device=self.device)
        sketch, atoms = Sketch(bank.to(self.kept), self.metric, self._moments, seed or 0), self._atoms(codes)
        with engine(self.device) as workers:
            for span, weighted in self._weighted_batches():
                mixed = mixtures(codes[span], bank, mixed_room)

                def work(
                    part: slice, span: slice = span, mixed: torch.Tensor = mixed, weighted: torch.Tensor = weighted
                ) -> Part:
                    numbers, wanted = within(span, part), weighted[part]
                    seen = mixed[part] if self.metric is None else self.metric.seen(numbers, mixed[part])
                    inner, basis, ridged = row_basis(seen, self._settings.ridge, self._rcond)
                    fitted = matmul(wanted, basis.mT)
                    some = slice(-numbers.start % self._stride, None, self._stride)
                    nothing = torch.zeros((), device=self.device)
                    found = Part(*_squares(wanted, fitted, basis), ridged, nothing, nothing, nothing, len(seen[some]))
                    if found.sampled:
                        found.gram = _unit_grams(seen[some])
                    if seed is None:
                        return found
                    square = matmul(fitted.mT, fitted)
                    moved = matmul(inner.mT, matmul(fitted.mT, wanted) - matmul(square, basis))
                    slope_room[part] = moved if self.metric is None else self.metric.unseen(numbers, moved)
                    left = matmul(matmul(inner.mT, square), inner, out=left_room[part])
                    if self.whole:
                        sketch.columns(numbers, basis, out=hidden_room[part])
                    else:
                        hidden_room[part] = basis
                    free_room[part] = free = sketch.free(numbers, basis)
                    found.means = free.square().sum((1, 2)) / free.shape[1]
                    if found.sampled:
                        columns = hidden_room[part][some] if self.whole else self._columns(sketch, numbers, basis, some)
                        found.columns = weighted_sum(left[some].diagonal(dim1=1, dim2=2).sum(1), columns)
                    return found

                for part, found in workers.map(work, len(weighted)):
                    sums.add(within(span, part), found)
                    advance((part.stop - part.start) * ranks.size())
                if seed is None:
                    continue
                lefts, hidden = left_room[: len(weighted)], hidden_room[: len(weighted)]
                sums.curvature[span] = sketch.codes(lefts, free_room[: len(weighted)], atoms[span], workers)
                self.lefts.put(span, lefts)
                self.hidden.put(span, hidden)
                sums.gather(span, (bank, codes), slope_room[: len(weighted)], lefts)
        return sums

    def _weighted_batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """One pass over W'_i, some at a time; they are made in the first pass that comes to its end."""
        if self.made:
            yield from zip(self.spans, self._weighted.take(self.spans), strict=True)
            return
        size = self.at_once
        room = torch.empty(size, self.family.p, self.family.d, device=self.device)
        with engine(self.device) as workers:
            for span, batch in expert_batches(self.family, size, self.device, self._mine):

                def weigh(part: slice, batch: torch.Tensor = batch, span: slice = span) -> None:
                    plain = batch[part].float()
                    room[part] = plain if self.metric is None else self.metric.weigh(within(span, part), plain)

                workers.run(weigh, len(batch))
                self._weighted.put(span, room[: len(batch)])
                yield span, room[: len(batch)]
        self.made = True

    def _atoms(self, codes: Array) -> torch.Tensor:
        """Of every expert the atoms whose codes' curvature is asked for: its own, or all where others may come in.

        (N, a), filled up with an expert's first atom.
        """
        count, atoms = codes.shape
        if self._settings.codes == "signed" or above_target(codes, self._settings):
            return torch.arange(atoms, device=self.device).expand(count, -1)
        own = [np.flatnonzero(row) for row in codes]
        found = np.zeros((count, max(1, *map(len, own))), np.int64)
        for numbers, mine in zip(found, own, strict=True):
            numbers[:] = mine[0] if len(mine) else 0
            numbers[: len(mine)] = mine
        return torch.from_numpy(found).to(self.device)

    def _columns(self, sketch: Sketch, numbers: slice, basis: torch.Tensor, some: slice) -> torch.Tensor:
        """K_i of the sampled experts among those of these numbers; nothing without a metric, which asks for none."""
        d = basis.shape[2]
        if self.metric is None:
            return torch.zeros(len(basis[some]), 1, 1, device=basis.device).expand(-1, d, d)
        found = [
            sketch.columns(slice(numbers.start + k, numbers.start + k + 1), basis[k : k + 1])
            for k in range(*some.indices(len(basis)))
        ]
        return torch.cat(found) if found else basis.new_zeros(0, d, d)


def _squares(wanted: torch.Tensor, fitted: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """‖W'‖² and ‖W' − W' QᵀQ‖² (n,): the difference of squares, or of the residual where the host may look."""

    def square(matrices: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = torch.linalg.vector_norm(matrices, dim=2)  # in fp32, and their squares' sum in fp64
        return rows.to(wide_dtype(matrices.device)).square().sum(1)

    energies = square(wanted)
    errors = (energies - square(fitted)).clamp(min=0)
    if per_core(wanted.device) and bool((errors < _SMALL_ERROR * energies).any()):
        errors = square(wanted - matmul(fitted, basis))
    return energies, torch.where(errors.isfinite(), errors, torch.inf)


def _unit_grams(seen: torch.Tensor) -> torch.Tensor:
    """Σ_i B̃'_iB̃'_iᵀ over its mean diagonal (r, r)."""
    products = matmul(seen, seen.mT)
    means = products.diagonal(dim1=1, dim2=2).mean(1)
    shares = torch.where(means > 0, 1 / means, torch.zeros_like(means))
    return weighted_sum(shares, products)
