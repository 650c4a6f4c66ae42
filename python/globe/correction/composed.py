"""The experts of a layer as they are stored: made of their factors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from globe.checkpoint.expert_module import ExpertModule
from globe.checkpoint.powers import times_power
from globe.compute.gemm import matmul, mixtures
from globe.fit.stored_lefts import Fit, solve_lefts
from globe.runs.job import Job


@dataclass(frozen=True)
class Factors:
    """A_i (p, r) as it is stored, in bf16, and the B̃_i (r, d; fp32) that it multiplies."""

    left: torch.Tensor
    mixed: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """W_i (p, d)."""
        return matmul(self.left.float(), self.mixed)


def compose_layer(experts: ExpertModule, fits: dict[str, Fit], layer: int, job: Job) -> dict[int, Factors]:
    """Put Ŵ_i = A_i Σ_j α_ij B_j in the place of a layer's W_i that are factored; the factors of those of down.

    Parameters
    ----------
    experts : ExpertModule
        With the layer's weights, which are changed.
    fits : dict
        The pools; left factors of down are not packed.
    layer : int
    job : Job
        Settings `ridge` and `ridge_rcond`; `blocks`.
    """
    both = experts.turned(getattr(experts.module, experts.first).detach())
    parts = dict(zip(("gate", "up"), experts.halves(both, 1), strict=True)) if experts.gated else {"up": both}
    parts["down"] = experts.turned(experts.module.down_proj.detach()).mT
    there = [
        (name, number)
        for name, fit in fits.items()
        for number, expert in enumerate(fit.family.experts)
        if expert.layer == layer
    ]
    downs: dict[int, Factors] = {}
    solutions = solve_lefts(fits, there, job.settings, job.blocks)
    for name, members in groupby(there, lambda place: place[0]):
        fit = fits[name]
        for _, number in members:
            expert, solved = fit.family.experts[number], next(solutions)
            mixed = fit.rows(mixtures(fit.state.codes[number : number + 1], fit.state.bank).float())[0]
            mixed = times_power(mixed, fit.power)
            parts[expert.family][expert.expert] = matmul(solved.values.to(mixed.device), mixed)
            if expert.family == "down":
                assert isinstance(solved.left, torch.Tensor), "left factors of down are packed"
                downs[expert.expert] = Factors(solved.left.to(mixed.device), mixed)
    return downs
