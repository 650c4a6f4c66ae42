"""What the curvature of the joint objective needs of single experts, from a few random columns where that is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from globe.compute.gemm import matmul
from globe.compute.passes import Engine
from globe.sizes.flops import SKETCHED
from globe.statistics.metric import Metric


class Sketch:
    """K_i = L_i (I − Π_i) L_iᵀ of experts, Π_i = QᵀQ being the projector on the rows of B̃'_i, and products with it.

    Parameters
    ----------
    bank : torch.Tensor, shape (m, r, d)
    metric : Metric or None
        L_i; the identity without.
    moments : mapping
        L Lᵀ of layers, as far as they are at hand.
    seed : int
        Draws Ω (d × 16), normal of variance 1/16: E Ω Ωᵀ = I.
    """

    def __init__(
        self, bank: torch.Tensor, metric: Metric | None, moments: Mapping[int | None, torch.Tensor], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._random = (torch.randn(bank.shape[2], SKETCHED, generator=generator) / math.sqrt(SKETCHED)).to(bank.device)
        self._bank, self._metric, self._moments = bank, metric, moments

    def columns(self, numbers: slice, basis: torch.Tensor) -> torch.Tensor:
        """K_i (n, d, d) of experts with bases Q (n, r, d)."""
        if self._metric is None:
            return torch.eye(basis.shape[2], device=basis.device) - matmul(basis.mT, basis)
        hidden = self._metric.unseen(numbers, basis)
        return torch.baddbmm(self._metric.moment(numbers, basis.shape[2], self._moments), hidden.mT, hidden, alpha=-1)

    def free(self, numbers: slice, basis: torch.Tensor) -> torch.Tensor:
        """L_i (I − Π_i) Ω (n, d, 16)."""
        free = self._random - matmul(basis.mT, matmul(basis, self._random))
        return free if self._metric is None else self._metric.unseen(numbers, free.mT.contiguous()).mT

    def codes(self, lefts: torch.Tensor, free: torch.Tensor, workers: Engine) -> torch.Tensor:
        """⟨A_i B_j F_i, A_i B_k F_i⟩ (n, m, m) of experts with C_i = A_iᵀA_i (n, r, r) and what `free` made."""
        (atoms, rank, width), (count, _, columns) = self._bank.shape, free.shape
        together = free.permute(1, 0, 2).reshape(width, -1)
        probes = torch.empty(atoms, rank, count * columns, device=free.device)
        found = torch.empty(count, atoms, atoms, device=free.device)

        def probe(part: slice) -> None:
            probes[part] = matmul(self._bank[part], together)

        def multiply(part: slice) -> None:
            mine = probes.view(atoms, rank, count, columns)[:, :, part].permute(2, 1, 0, 3)
            mine = mine.reshape(len(mine), rank, atoms * columns)
            weighed = matmul(lefts[part], mine)
            found[part] = _by_atoms(mine, columns) @ _by_atoms(weighed, columns).mT

        workers.run(probe, atoms)
        workers.run(multiply, count)
        return found


def _by_atoms(probed: torch.Tensor, columns: int) -> torch.Tensor:
    """(n, r, m · 16) as (n, m, r · 16)."""
    count, rank, wide = probed.shape
    return probed.view(count, rank, wide // columns, columns).transpose(1, 2).reshape(count, wide // columns, -1)
