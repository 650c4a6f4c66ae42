"""One streamed pass over the experts of a family: measure a state, code its targets, sum the dictionary step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint import Family
from globe.codes import coding_step
from globe.gemm import bank_gram, correlations, matmul, mixtures, spd_inverse
from globe.lefts import fit_lefts, squared_errors
from globe.proxies import Rows
from globe.settings import Settings
from globe.stages import Advance
from globe.stream import expert_batches

Array = NDArray[np.float64]
_BATCH_BYTES = 48 << 20


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

    `irregular` counts the experts whose coding problem was singular or did not converge.
    """

    codes: Array
    irregular: int
    right_side: torch.Tensor
    left_grams: torch.Tensor | None


def _batch(family: Family) -> int:
    return max(1, _BATCH_BYTES // (4 * family.p * family.d))


def measure(family: Family, rows: Rows, state: State, settings: Settings, advance: Advance) -> Measure:
    """Refit every left factor and measure the error; one pass."""
    meter = _Meter(family, rows)
    for span, weights in expert_batches(family, _batch(family), state.bank.device):
        weights = weights.float()
        mixed = mixtures(state.codes[span], state.bank)
        fit = fit_lefts(weights, mixed, settings)
        meter.add(span, weights, fit.lefts, mixed, fit.ridged)
        advance(len(weights))
    return meter.result()


def sweep(family: Family, rows: Rows, state: State, settings: Settings, advance: Advance) -> tuple[Measure, Sums]:
    """Measure a state, code the targets that its left factors imply, and sum the dictionary step's right side.

    The targets are T_i = A_i⁺ W_i on the training rows (`exact`, `aligned`), or the normalised proxies
    (`fixed`). The right side is Σ_i α_ij A_iᵀ W_i for `exact`, Σ_i α_ij T_i otherwise.
    """
    device = state.bank.device
    meter, gram = _Meter(family, rows), bank_gram(state.bank)
    train, proxy = (torch.from_numpy(index).to(device) for index in (rows.train, rows.proxy))
    codes, irregular = np.zeros_like(state.codes), 0
    right_side = torch.zeros_like(state.bank)
    rank = state.bank.shape[1]
    exact = settings.mod == "exact"
    left_grams = torch.empty(len(family), rank, rank, device=device) if exact else None
    for span, weights in expert_batches(family, _batch(family), device):
        weights = weights.float()
        mixed = mixtures(state.codes[span], state.bank)
        fit = fit_lefts(weights, mixed, settings)
        meter.add(span, weights, fit.lefts, mixed, fit.ridged)
        if settings.mod == "fixed":
            targets = weights[:, proxy]
            norms = targets.flatten(1).norm(dim=1)
            targets = targets / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None, None]
            summand = targets
        else:
            lefts = fit.lefts[:, train]
            normal, summand = matmul(lefts.mT, lefts), matmul(lefts.mT, weights[:, train])
            inverse, _ = spd_inverse(normal, settings.ridge, settings.ridge_rcond)
            targets = matmul(inverse, summand)
            if left_grams is not None:
                left_grams[span] = normal
            else:
                summand = targets
        coding = coding_step(gram, correlations(targets, state.bank), settings, state.temperature)
        codes[span] = coding.codes
        irregular += coding.irregular
        shares = torch.from_numpy(codes[span].T.astype(np.float32)).to(device)
        right_side += (shares @ summand.flatten(1)).view_as(right_side)
        advance(len(weights))
    return meter.result(), Sums(codes, irregular, right_side, left_grams)


class _Meter:
    """Sums squared errors and energies over batches of experts."""

    def __init__(self, family: Family, rows: Rows) -> None:
        self._errors = torch.zeros(len(family), family.p, dtype=torch.float64)
        self._energy = torch.zeros(len(family), family.p, dtype=torch.float64)
        self._rows = rows
        self._ridged = 0

    def add(
        self, span: slice, weights: torch.Tensor, lefts: torch.Tensor, mixed: torch.Tensor, ridged: torch.Tensor
    ) -> None:
        self._errors[span] = squared_errors(weights, lefts, mixed)
        self._energy[span] = weights.pow(2).sum(2).cpu().double()
        self._ridged += int(ridged.sum())

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
