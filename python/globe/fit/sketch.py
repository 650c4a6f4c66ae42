"""What the curvature of the joint objective needs of single experts, from a few random columns where that is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from globe.compute.gemm import matmul
from globe.compute.passes import Engine
from globe.sizes.flops import PROBED, SKETCHED
from globe.statistics.metric import Metric


class Sketch:
    """K_i = L_i (I − Π_i) L_iᵀ of experts, Π_i = QᵀQ being the projector on the rows of B̃'_i, and products with it.

    Parameters
    ----------
    bank : torch.Tensor, shape (m, r, d), fp32 or bf16
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

    def columns(self, numbers: slice, basis: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """K_i (n, d, d) of experts with bases Q (n, r, d), in a metric; written to `out` if given."""
        assert self._metric is not None, "K_i are asked for in a metric alone"
        hidden = self._metric.unseen(numbers, basis)
        moment = self._metric.moment(numbers, basis.shape[2], self._moments)
        return torch.baddbmm(moment, hidden.mT, hidden, alpha=-1, out=out)

    def free(self, numbers: slice, basis: torch.Tensor) -> torch.Tensor:
        """L_i (I − Π_i) Ω (n, d, 16)."""
        free = self._random - matmul(basis.mT, matmul(basis, self._random))
        return free if self._metric is None else self._metric.unseen(numbers, free.mT.contiguous()).mT

    def codes(self, lefts: torch.Tensor, free: torch.Tensor, atoms: torch.Tensor, workers: Engine) -> torch.Tensor:
        """⟨A_i B_j F_i, A_i B_k F_i⟩ (n, m, m) of experts, zero but for some atoms of each.

        Parameters
        ----------
        lefts : torch.Tensor, shape (n, r, r)
            C_i = A_iᵀA_i.
        free : torch.Tensor, shape (n, d, 16)
            F_i, as `free` makes it.
        atoms : torch.Tensor, shape (n, a)
            Of every expert the numbers of its atoms; one may stand there several times.
        workers : Engine
        """
        found = torch.zeros(len(lefts), len(self._bank), len(self._bank), device=free.device)

        def multiply(part: slice) -> None:
            some = atoms[part]
            probes = torch.cat([self._probed(few, free[part]) for few in some.split(PROBED, 1)], 1)  # (n, a, r, 16)
            weighed = matmul(lefts[part, None], probes)
            products = matmul(probes.flatten(2), weighed.flatten(2).mT)
            places = torch.arange(part.start, part.stop, device=some.device)[:, None, None]
            found[places, some[:, :, None], some[:, None]] = products

        workers.run(multiply, len(lefts))
        return found

    def _probed(self, atoms: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """B_j F_i (n, a, r, 16) of some atoms (n, a) of experts with F_i (n, d, 16)."""
        chosen = self._bank[atoms]
        probes = matmul(chosen.flatten(1, 2), free.to(chosen.dtype))
        return probes.to(free.dtype).view(*chosen.shape[:3], -1)
