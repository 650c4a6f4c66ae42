"""What a pass over experts sums: their errors, and the dictionary step's side of the equations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.forms import wide_dtype
from globe.compute.gemm import scatter_add, solver_dtype
from globe.compute.passes import shifted
from globe.fit.codes import Coding
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
class Refit:
    """Experts with refitted left factors: ‖row‖² and squared error of every row (n, p), and which were ridged (n,)."""

    energies: torch.Tensor
    errors: torch.Tensor
    ridged: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """Squared errors and energies of the rows of all experts (N, p), and which were ridged; zero where not yet seen.

    They lie where experts are worked on until they are asked for.
    """

    energies: torch.Tensor
    squares: torch.Tensor
    ridged: torch.Tensor
    rows: Rows

    @staticmethod
    def none(pool: Pool, device: torch.device) -> Errors:
        """Of no expert."""
        shape, wide = (len(pool.family), pool.family.p), wide_dtype(device)
        energies, squares = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))
        return Errors(energies, squares, torch.zeros(shape[0], dtype=torch.bool, device=device), pool.rows)

    def add(self, some: slice, found: Refit) -> None:
        """Add the experts of these numbers."""
        self.energies[some], self.squares[some], self.ridged[some] = found.energies, found.errors, found.ridged

    def merge(self, other: Errors) -> None:
        """Add what was found of other experts."""
        self.energies.add_(other.energies)
        self.squares.add_(other.squares)
        self.ridged.logical_or_(other.ridged)

    def over_ranks(self) -> Errors:
        """The errors that all ranks have found."""
        ridged = ranks.summed(self.ridged.to(torch.uint8)).bool()
        return replace(self, energies=ranks.summed(self.energies), squares=ranks.summed(self.squares), ridged=ridged)

    def trained(self) -> Array:
        """Every expert's error on the training rows."""
        energies, squares = self._here()
        return _per_expert(energies[:, self.rows.train], squares[:, self.rows.train])

    def measure(self) -> Measure:
        """The errors over all experts that were added."""
        energies, squares = self._here()

        def ratio(rows: slice | NDArray[np.int64]) -> float:
            energy = float(energies[:, rows].sum())
            return ranks.agreed(float(squares[:, rows].sum()) / energy if energy > 0 else 0.0)

        validation = ratio(self.rows.validation) if len(self.rows.validation) else float("nan")
        everything = slice(None)
        return Measure(
            ratio(everything),
            ratio(self.rows.train),
            validation,
            _per_expert(energies, squares),
            int(self.ridged.sum()),
        )

    def _here(self) -> tuple[Array, Array]:
        return self.energies.cpu().double().numpy(), self.squares.cpu().double().numpy()


def _per_expert(energies: Array, squares: Array) -> Array:
    whole = energies.sum(1)
    found: Array = squares.sum(1) / np.where(whole > 0, whole, 1.0)
    return found


@dataclass
class Sums:
    """What the dictionary step needs: new codes, the right side (m, r, d), and A_iᵀA_i (exact only).

    The right side is Σ_i α_ij T_i; for `exact` Σ_i α_ij (A_iᵀW_i − A_iᵀA_i Σ_k α_ik B_k), the residual of the normal
    equations at the bank as it is. `irregular` counts the experts whose coding problem was singular or did not
    converge. `metric` is that of the normal equations, A_i standing for D_i A_i: their residual is then
    Σ_i α_ij A_iᵀ(D_i W_i − A_i Σ_k α_ik B_k) L_i L_iᵀ. `errors` (N,) are the experts' relative errors on the
    training rows, for re-seeding. Experts that were not added have no codes and no A_iᵀA_i, which are kept of `mine`
    alone, the experts of this rank.
    """

    codes: Array
    irregular: int
    right_side: torch.Tensor
    left_grams: torch.Tensor | None
    metric: Metric | None = None
    errors: Array | None = None
    mine: slice = field(default_factory=lambda: slice(0, None))

    @staticmethod
    def none(pool: Pool, state: State, settings: Settings) -> Sums:
        """Of no expert."""
        rank, device, exact = state.bank.shape[1], state.bank.device, settings.mod == "exact"
        kept = solver_dtype(settings.precision, device)
        mine, metric = ranks.dealt(pool.family), pool.metric if exact else None
        held = mine.stop - mine.start
        left_grams = torch.zeros(held, rank, rank, dtype=kept, device=device) if exact else None
        return Sums(np.zeros_like(state.codes), 0, torch.zeros_like(state.bank), left_grams, metric, mine=mine)

    def code(self, some: slice, coding: Coding) -> None:
        """Take the codes of the experts of these numbers."""
        self.codes[some] = coding.codes
        self.irregular += coding.irregular

    def add(self, some: slice, summands: torch.Tensor, left_grams: torch.Tensor | None, room: torch.Tensor) -> None:
        """Add the summands (n, r, d) of experts that have their codes, and keep their A_iᵀA_i.

        `room` is that of `scatter_add`.
        """
        scatter_add(self.codes[some], summands, self.right_side, room)
        if self.left_grams is not None and left_grams is not None:
            self.left_grams[shifted(some, -self.mine.start)] = left_grams

    def merge(self, other: Sums) -> None:
        """Add what was summed over other experts."""
        self.codes = self.codes + other.codes
        self.irregular += other.irregular
        self.right_side.add_(other.right_side)
        if self.left_grams is not None and other.left_grams is not None:
            self.left_grams.add_(other.left_grams)

    def over_ranks(self) -> Sums:
        """What all ranks have summed, but for the A_iᵀA_i, which stay where their experts are."""
        irregular = int(ranks.summed_array(np.array([self.irregular]))[0])
        return replace(
            self, codes=ranks.summed_array(self.codes), irregular=irregular, right_side=ranks.summed(self.right_side)
        )
