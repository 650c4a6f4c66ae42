"""One streamed pass over the experts of a family: measure a state, code its targets, sum the dictionary step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.gemm import correlations, dictionary_dtype, grams, matmul, mixtures, scatter_add, storable
from globe.compute.spd import spd_inverse
from globe.compute.stream import Workers, expert_batches
from globe.fit.codes import coding_step
from globe.fit.lefts import LeftFit, fit_lefts, row_energies, squared_errors
from globe.fit.sight import Sight
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.seeds.proxies import Rows
from globe.settings import Settings
from globe.statistics.metric import Metric

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """A bank (m, r, d) of unit atoms, codes (N, m), and the temperature of the next coding."""

    bank: torch.Tensor
    codes: Array
    temperature: float


@dataclass(frozen=True)
class Measure:
    """How well a state fits, with left factors refitted.

    All errors are Σ‖W − Ŵ‖² / Σ‖W‖², in the metric where there is one: over all rows, over the training rows, over the
    held-out rows (NaN without any). `expert_errors` (N,) is per expert; `ridged` counts ill-conditioned left factors.
    """

    relative_error: float
    train_error: float
    validation_error: float
    expert_errors: Array
    ridged: int


@dataclass(frozen=True)
class Sums:
    """What the dictionary step needs: new codes, the right side (m, r, d), and A_iᵀA_i (exact only).

    The right side is Σ_i α_ij T_i; for `exact` Σ_i α_ij (A_iᵀW_i − A_iᵀA_i Σ_k α_ik B_k), the residual of the normal
    equations at the bank as it is. `irregular` counts the experts whose coding problem was singular or did not
    converge. `metric` is that of the normal equations, A_i standing for D_i A_i: their residual is then
    Σ_i α_ij A_iᵀ(D_i W_i − A_i Σ_k α_ik B_k) L_i L_iᵀ. `errors` (N,) are the experts' relative errors on the
    training rows, for re-seeding.
    """

    codes: Array
    irregular: int
    right_side: torch.Tensor
    left_grams: torch.Tensor | None
    metric: Metric | None = None
    errors: Array | None = None


def measure(pool: Pool, state: State, job: Job, advance: Advance) -> Measure:
    """Refit every left factor and measure the error, in the pool's metric if it has one; one pass."""
    family, settings = pool.family, job.settings
    meter, sight = _Meter(family, pool.rows), Sight(state.bank, pool.metric, settings)
    mixed_room = _room(family, state, job.blocks)
    with Workers(state.bank.device) as workers:
        for span, batch in expert_batches(family, job.blocks.experts, state.bank.device):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)

            def refit(
                k: int, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed, first: int = span.start
            ) -> Refit:
                return _refit(*sight.look(first + k, batch[k : k + 1], mixed[k : k + 1]), settings)[0]

            for number, found in enumerate(workers.map(refit, len(batch)), span.start):
                meter.add(number, found)
                advance(1)
    return meter.result()


def sweep(pool: Pool, state: State, job: Job, advance: Advance) -> tuple[Measure, Sums]:
    """Measure a state, code the targets that its left factors imply, and sum the dictionary step's right side.

    The targets are T_i = A_i⁺ W_i on the training rows (`exact`, `aligned`), or the normalised proxies
    (`fixed`). One pass; an expert is measured, coded and summed while it is in hand. In a metric, whose rows must not
    mix where some are held out, experts and mixtures are seen through it (:class:`globe.fit.sight.Sight`). `aligned`
    then sums T_i = (D_i A_i)⁺ D_i W_i as they are: argmin Σ_i ‖(T_i − Σ_j α_ij B_j) L‖² with one L for all is MOD.
    """
    family, rows, metric, settings, device = pool.family, pool.rows, pool.metric, job.settings, state.bank.device
    meter, sight = _Meter(family, rows), Sight(state.bank, metric, settings)
    proxy, held = (torch.from_numpy(index).to(device) for index in (rows.proxy, rows.validation))
    codes, irregular = np.zeros_like(state.codes), 0
    right_side = torch.zeros_like(state.bank)
    rank = state.bank.shape[1]
    exact = settings.mod == "exact"
    kept = dictionary_dtype(settings.precision, device)
    left_grams = torch.empty(len(family), rank, rank, dtype=kept, device=device) if exact else None
    mixed_room, target_room = _room(family, state, job.blocks), _room(family, state, job.blocks)
    apart = exact or (metric is not None and settings.mod == "aligned")
    summand_room = _room(family, state, job.blocks) if apart else target_room
    gram_room = torch.empty(len(target_room), rank, rank, device=device) if exact else None
    with Workers(device) as workers:
        for span, batch in expert_batches(family, job.blocks.experts, device):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)
            targets, summands = target_room[: len(batch)], summand_room[: len(batch)]

            def work(k: int, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed, span: slice = span) -> Refit:
                one, number = slice(k, k + 1), span.start + k
                seen = sight.look(number, batch[one], mixed[one])
                found, fit = _refit(*seen, settings)
                if settings.mod == "fixed":
                    chosen = batch[k, proxy].float()
                    norm = chosen.norm()
                    target_room[k] = chosen / torch.where(norm > 0, norm, torch.ones_like(norm))
                    return found
                transposed = fit.lefts.index_fill(1, held, 0.0).mT.contiguous()
                normal = grams(transposed)
                inverse, _ = spd_inverse(normal, settings.ridge, settings.ridge_rcond)
                target_room[k], summand = sight.aim(number, transposed, inverse.to(device), batch[one], seen[0])
                if summand_room is not target_room:
                    summand_room[k] = summand
                if gram_room is not None:
                    gram_room[k] = normal[0]
                return found

            for number, found in enumerate(workers.map(work, len(batch)), span.start):
                meter.add(number, found)
                advance(1)
            matched = correlations(targets, state.bank)
            for some, gram in sight.grams(span, workers):
                part = matched[some.start - span.start : some.stop - span.start]
                coding = coding_step(gram, part, settings, state.temperature)
                codes[some] = coding.codes
                irregular += coding.irregular
            if left_grams is not None and gram_room is not None:
                mixtures(codes[span], state.bank, mixed_room)

                def subtract(k: int, first: int = span.start) -> None:
                    summand_room[k] -= sight.fitted(first + k, matmul(gram_room[k], mixed_room[k]))

                for _ in workers.map(subtract, len(batch)):
                    pass
                left_grams[span] = storable(gram_room[: len(batch)], kept)
            scatter_add(codes[span], summands, right_side, mixed_room)
    sums = Sums(codes, irregular, right_side, left_grams, metric if exact else None, meter.trained())
    return meter.result(), sums


@dataclass(frozen=True)
class Refit:
    """An expert with its left factor refitted: ‖row‖² and squared error of every row (p,); whether it was ridged."""

    energies: torch.Tensor
    errors: torch.Tensor
    ridged: bool


def _refit(weights: torch.Tensor, mixed: torch.Tensor, settings: Settings) -> tuple[Refit, LeftFit]:
    fit = fit_lefts(weights, mixed, settings)
    energies = row_energies(weights)
    errors = squared_errors(weights, energies, mixed, fit, fit.lefts)
    return Refit(energies[0], errors[0], bool(fit.ridged[0])), fit


def _room(family: Family, state: State, blocks: Blocks) -> torch.Tensor:
    """Memory for a matrix of the bank's shape per expert in hand."""
    return torch.empty(min(blocks.experts, len(family)), *state.bank.shape[1:], device=state.bank.device)


class _Meter:
    """Sums squared errors and energies over batches of experts."""

    def __init__(self, family: Family, rows: Rows) -> None:
        self._errors = torch.zeros(len(family), family.p, dtype=torch.float64)
        self._energy = torch.zeros(len(family), family.p, dtype=torch.float64)
        self._rows = rows
        self._ridged = 0

    def add(self, number: int, found: Refit) -> None:
        self._energy[number], self._errors[number] = found.energies, found.errors
        self._ridged += found.ridged

    def trained(self) -> Array:
        """Every expert's error on the training rows."""
        return self._per_expert(torch.from_numpy(self._rows.train))

    def _per_expert(self, rows: slice | torch.Tensor) -> Array:
        energy = self._energy[:, rows].sum(1)
        errors: Array = (
            self._errors[:, rows].sum(1) / torch.where(energy > 0, energy, torch.ones_like(energy))
        ).numpy()
        return errors

    def result(self) -> Measure:
        everything = slice(None)
        return Measure(
            self._ratio(everything),
            self._ratio(torch.from_numpy(self._rows.train)),
            self._ratio(torch.from_numpy(self._rows.validation)) if len(self._rows.validation) else float("nan"),
            self._per_expert(everything),
            self._ridged,
        )

    def _ratio(self, rows: slice | torch.Tensor) -> float:
        energy = float(self._energy[:, rows].sum())
        return float(self._errors[:, rows].sum()) / energy if energy > 0 else 0.0
