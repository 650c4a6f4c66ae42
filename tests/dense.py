"""The joint objective in fp64 and in plain torch, beside the metrics and families of its tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from families import Array, make_family, make_job, planted, whole_pool
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.fit.problem import Problem
from globe.settings import Settings
from globe.statistics.metric import Metric
from globe.statistics.own_columns import OwnColumns

EXPERTS, P, D, RANK, ATOMS = 6, 10, 14, 3, 5
OWN = 3  # directions of an expert's own moment
WHOLE = 7  # a rank with which K_i is kept whole in a metric; with RANK it is its basis
METRICS = ("none", "shared", "scaled", "own", "rows")
CASES = [*((kind, RANK) for kind in METRICS), *((kind, WHOLE) for kind in METRICS if kind != "none")]
FOUR = Blocks(experts=4)
NOWHERE = Path("all shelves are in memory")


def random_metric(kind: str, *, experts: int = EXPERTS, p: int = P, d: int = D, layers: int = 2) -> Metric | None:
    """Diagonal rows and shared columns; scales or own directions on top; full rows without columns; or no metric."""
    if kind == "none":
        return None
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    if kind == "rows":
        return Metric(tuple(draw(p, p) for _ in range(experts)), {}, None, (None,) * experts)
    rows = tuple(draw(p).abs() + 0.1 for _ in range(experts))
    columns = {layer: torch.eye(d) + 0.5 * draw(d, d).tril() for layer in range(layers)}
    scales = tuple(draw(d).abs() + 0.2 for _ in range(experts)) if kind == "scaled" else None
    own = None
    if kind == "own":  # some as their layer, some of less than it, some of more
        values = torch.tensor([[0.0] * OWN, [-0.9, 0.5, 8.0], [3.0, -0.5, 0.0]]).repeat(-(-experts // 3), 1)[:experts]
        own = OwnColumns(torch.linalg.qr(draw(experts, d, OWN))[0], values)
    return Metric(rows, columns, scales, tuple(number * layers // experts for number in range(experts)), own=own)


@dataclass(frozen=True)
class Dense:
    """The experts W_i (N, p, d) and, for each, D_i (p, p) and L_i (d, d), all in fp64."""

    weights: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def seen(self) -> torch.Tensor:
        """W'_i."""
        return self.rows @ self.weights @ self.columns

    @property
    def energy(self) -> torch.Tensor:
        return self.seen.square().sum()

    def mixtures(self, bank: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """B̃'_i."""
        return torch.einsum("ij,jrd->ird", codes, bank) @ self.columns

    def lefts(self, bank: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """D_i A_i."""
        return self.seen @ torch.linalg.pinv(self.mixtures(bank, codes))

    def shares(self, bank: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Every expert's share of f."""
        residuals = self.seen - self.lefts(bank, codes) @ self.mixtures(bank, codes)
        return residuals.square().sum((1, 2)) / self.energy

    def free(self, bank: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """L_i (I − Π_i)."""
        mixed = self.mixtures(bank, codes)
        return self.columns @ (torch.eye(mixed.shape[2], dtype=torch.float64) - torch.linalg.pinv(mixed) @ mixed)

    def jacobian(self, bank: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the residuals by bank (N p d, m r d) and codes (N p d, N m), without the terms that Kaufman leaves out.

        The differential of W'_i (I − Π_i) is −A_i dB̃'_i (I − Π_i) − W'_i (I − Π_i) dB̃'_iᵀ B̃'_i⁺ᵀ: the second term is
        left out.
        """
        return self.jacobian_of(self.lefts(bank, codes), self.free(bank, codes), bank, codes)

    def jacobian_of(
        self, lefts: torch.Tensor, free: torch.Tensor, bank: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of −A_i Σ_j α_ij B_j L_i (I − Π_i) by bank and codes, with A_i and what is `free` as they are."""
        (count, atoms), rows = codes.shape, self.weights[0].numel()
        by_bank = torch.einsum("ij,ipr,ide->ipejrd", -codes, lefts, free).reshape(count * rows, -1)
        by_codes = torch.zeros(count, rows, count, atoms, dtype=torch.float64)
        each = torch.einsum("ipr,jrd,ide->ipej", lefts, bank, free).reshape(count, rows, atoms)
        by_codes[torch.arange(count), :, torch.arange(count)] = -each
        return by_bank, by_codes.reshape(count * rows, -1)


def dense_of(family: Family, metric: Metric | None) -> Dense:
    weights = torch.stack([family.read(number).double() for number in range(len(family))])
    count, p, d = weights.shape
    rows = torch.eye(p, dtype=torch.float64).repeat(count, 1, 1)
    columns = torch.eye(d, dtype=torch.float64).repeat(count, 1, 1)
    for number in range(count if metric is not None else 0):
        assert metric is not None
        mine, layer = metric.rows[number].double(), metric.layers[number]
        rows[number] = mine.diag() if mine.ndim == 1 else mine
        if layer is not None:
            columns[number] = metric.columns[layer].double()
        if layer is not None and metric.scales is not None:
            columns[number] = metric.scales[number].double()[:, None] * columns[number]
        if layer is not None and metric.own is not None:
            columns[number] = columns[number] @ dense_own(metric.own, number)
    return Dense(weights, rows, columns)


def dense_own(own: OwnColumns, number: int) -> torch.Tensor:
    """R_i (d, d) in fp64: the root of I + U_i Λ_i U_iᵀ."""
    directions, values = own.directions[number].double(), own.values[number].double()
    values, vectors = torch.linalg.eigh(torch.eye(len(directions)) + directions @ values.diag() @ directions.T)
    return vectors @ values.sqrt().diag() @ vectors.T


def small_family(directory: Path, *, noise: float = 0.5, seed: int = 0) -> Family:
    weights = planted(seed, experts=EXPERTS, p=P, d=D, rank=RANK, atoms=ATOMS, uses=3, noise=noise)
    return make_family(directory, weights)


def problem_of(
    family: Family,
    metric: Metric | None,
    *,
    shape: tuple[int, int, int] = (ATOMS, RANK, D),
    blocks: Blocks = FOUR,
    settings: Settings | None = None,
    folder: Path = NOWHERE,
) -> Problem:
    """The problem of a family of which no row is held out, in fp32 unless `settings` say otherwise.

    Shelves that are not in memory lie in `folder`.
    """
    return Problem(
        whole_pool(family, metric), shape, make_job(settings or Settings(precision="fp32"), blocks=blocks), folder
    )


def random_point(seed: int = 3, *, signed: bool = True, rank: int = RANK) -> tuple[torch.Tensor, Array]:
    """A bank (fp32) and codes."""
    random = torch.Generator().manual_seed(seed)
    bank = torch.randn(ATOMS, rank, D, generator=random)
    codes = torch.randn(EXPERTS, ATOMS, generator=random, dtype=torch.float64).numpy()
    return bank, codes if signed else abs(codes)
