"""The experts of a layer as they are stored: gate and up made of their factors."""

from __future__ import annotations

from itertools import groupby

import torch

from globe.checkpoint.powers import times_power
from globe.compute.gemm import matmul, mixtures
from globe.fit.stored_lefts import Fit, solve_lefts
from globe.runs.job import Job


def compose_layer(gate_up: torch.Tensor, fits: dict[str, Fit], layer: int, job: Job) -> torch.Tensor:
    """A layer's gate_up (E, 2p, d) with Ŵ_i = A_i Σ_j α_ij B_j in place of the W_i that are factored.

    Parameters
    ----------
    gate_up : torch.Tensor, shape (E, 2p, d)
        Every expert's gate above its up matrix; it stays as it is.
    fits : dict
        The pools, of gate or up or both.
    layer : int
    job : Job
        Settings `ridge` and `ridge_rcond`; `blocks`.
    """
    found = gate_up.clone()
    width = gate_up.shape[1] // 2
    there = [
        (name, number)
        for name, fit in fits.items()
        for number, expert in enumerate(fit.family.experts)
        if expert.layer == layer
    ]
    solutions = solve_lefts(fits, there, job.settings, job.blocks)
    for name, members in groupby(there, lambda place: place[0]):
        fit = fits[name]
        for _, number in members:
            expert, solved = fit.family.experts[number], next(solutions)
            mixed = fit.rows(mixtures(fit.state.codes[number : number + 1], fit.state.bank).float())[0]
            mixed = times_power(mixed, fit.power)
            first = width if expert.family == "up" else 0
            found[expert.expert, first : first + width] = matmul(solved.values.to(mixed.device), mixed)
    return found
