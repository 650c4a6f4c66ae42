"""One streamed pass over the experts of a family: measure a state, code its targets, sum the dictionary step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.budget import BLOCKS, Blocks
from globe.checkpoint import Family
from globe.codes import coding_step
from globe.gemm import (
    bank_gram,
    correlations,
    dictionary_dtype,
    grams,
    matmul,
    mixtures,
    scatter_add,
    spd_inverse,
    storable,
    weights_operand,
)
from globe.lefts import LeftFit, fit_lefts, row_energies, squared_errors
from globe.proxies import Rows
from globe.settings import Settings
from globe.stages import Advance
from globe.stream import Workers, expert_batches

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

    All errors are Σ‖W − Ŵ‖² / Σ‖W‖²: over all rows, over the training rows, over the held-out rows (NaN
    without any). `expert_errors` (N,) is per expert; `ridged` counts ill-conditioned left factors.
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
    converge.
    """

    codes: Array
    irregular: int
    right_side: torch.Tensor
    left_grams: torch.Tensor | None


def measure(
    family: Family, rows: Rows, state: State, settings: Settings, advance: Advance, blocks: Blocks = BLOCKS
) -> Measure:
    """Refit every left factor and measure the error; one pass."""
    meter = _Meter(family, rows)
    mixed_room = _room(family, state, blocks)
    with Workers(state.bank.device) as workers:
        for span, batch in expert_batches(family, blocks.experts, state.bank.device):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)

            def refit(k: int, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed) -> Refit:
                weights = weights_operand(batch[k : k + 1])
                return _refit(weights, mixed[k : k + 1], settings)[0]

            for number, found in enumerate(workers.map(refit, len(batch)), span.start):
                meter.add(number, found)
                advance(1)
    return meter.result()


def sweep(
    family: Family, rows: Rows, state: State, settings: Settings, advance: Advance, blocks: Blocks = BLOCKS
) -> tuple[Measure, Sums]:
    """Measure a state, code the targets that its left factors imply, and sum the dictionary step's right side.

    The targets are T_i = A_i⁺ W_i on the training rows (`exact`, `aligned`), or the normalised proxies
    (`fixed`). One pass; an expert is measured, coded and summed while it is in hand.
    """
    device = state.bank.device
    meter, gram = _Meter(family, rows), bank_gram(state.bank)
    proxy, held = (torch.from_numpy(index).to(device) for index in (rows.proxy, rows.validation))
    codes, irregular = np.zeros_like(state.codes), 0
    right_side = torch.zeros_like(state.bank)
    rank = state.bank.shape[1]
    exact = settings.mod == "exact"
    kept = dictionary_dtype(settings.precision, device)
    left_grams = torch.empty(len(family), rank, rank, dtype=kept, device=device) if exact else None
    mixed_room, target_room = _room(family, state, blocks), _room(family, state, blocks)
    summand_room = _room(family, state, blocks) if exact else target_room
    gram_room = torch.empty(len(target_room), rank, rank, device=device) if exact else None
    with Workers(device) as workers:
        for span, batch in expert_batches(family, blocks.experts, device):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)
            targets, summands = target_room[: len(batch)], summand_room[: len(batch)]

            def work(k: int, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed, span: slice = span) -> Refit:
                one = slice(k, k + 1)
                weights = weights_operand(batch[one])
                found, fit = _refit(weights, mixed[one], settings)
                if settings.mod == "fixed":
                    chosen = batch[k, proxy].float()
                    norm = chosen.norm()
                    target_room[k] = chosen / torch.where(norm > 0, norm, torch.ones_like(norm))
                    return found
                transposed = fit.lefts.index_fill(1, held, 0.0).mT.contiguous()
                normal, moved = grams(transposed), matmul(transposed, weights)
                inverse, _ = spd_inverse(normal, settings.ridge, settings.ridge_rcond)
                target_room[k] = matmul(inverse.to(device), moved)[0]
                if gram_room is not None:
                    summand_room[k], gram_room[k] = moved[0], normal[0]
                return found

            for number, found in enumerate(workers.map(work, len(batch)), span.start):
                meter.add(number, found)
                advance(1)
            coding = coding_step(gram, correlations(targets, state.bank), settings, state.temperature)
            codes[span] = coding.codes
            irregular += coding.irregular
            if left_grams is not None and gram_room is not None:
                mixtures(codes[span], state.bank, mixed_room)

                def subtract(k: int) -> None:
                    summand_room[k] -= matmul(gram_room[k], mixed_room[k])

                for _ in workers.map(subtract, len(batch)):
                    pass
                left_grams[span] = storable(gram_room[: len(batch)], kept)
            scatter_add(codes[span], summands, right_side, mixed_room)
    return meter.result(), Sums(codes, irregular, right_side, left_grams)


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

    def result(self) -> Measure:
        everything = slice(None)
        energy = self._energy.sum(1)
        per_expert = self._errors.sum(1) / torch.where(energy > 0, energy, torch.ones_like(energy))
        return Measure(
            self._ratio(everything),
            self._ratio(torch.from_numpy(self._rows.train)),
            self._ratio(torch.from_numpy(self._rows.validation)) if len(self._rows.validation) else float("nan"),
            per_expert.numpy(),
            self._ridged,
        )

    def _ratio(self, rows: slice | torch.Tensor) -> float:
        energy = float(self._energy[:, rows].sum())
        return float(self._errors[:, rows].sum()) / energy if energy > 0 else 0.0
