"""Seeds by PCA of proxies rotated to a common reference: neurons lie in no common order, row spaces do."""

from __future__ import annotations

from functools import partial

import torch

from globe.compute import ranks
from globe.compute.gemm import GramSum, matmul
from globe.compute.stream import ahead
from globe.seeds.gram_space import seeds_from_gram
from globe.seeds.sources import leading_eigenvectors, stored_proxies, training_rows
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import principal

_FLOOR = 1e-3
_STEPS = 12


def aligned_pca(task: SeedTask) -> Seeds:
    """The m leading principal directions of the normalised proxies O_i W_i, each rotated to the reference R (r × d).

    O_i = argmin ‖O W_i − R‖ over O (r × p) of orthonormal rows (orthogonal Procrustes) is the polar factor of R W_iᵀ;
    W_i without the rows held out. R is at first the r leading eigenvectors of Σ W_iᵀ W_i over at most `energy_experts`
    experts, then the mean of the normalised proxies, `procrustes_rounds` − 1 times. A pass for the first reference,
    one for every round, of which the last writes the proxies to a scratch file, and two over that file.
    """
    reference = _shared_right_subspace(task)
    for _ in range(task.settings.procrustes_rounds - 1):
        reference = _mean(task, reference)
    proxies, _ = stored_proxies(task, lambda weights: aligned(weights, reference))
    return seeds_from_gram(proxies, lambda task, gram: principal(task, gram, task.size))


def aligned(weights: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """O_i W_i (n, r, d) of experts W_i (n, p, d)."""
    return torch.stack([matmul(polar(matmul(reference, matrix.T)), matrix) for matrix in weights])


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal polar factor U Vᵀ of a wide M = U Σ Vᵀ, by scaled Newton-Schulz steps: GEMMs only.

    X ← ½ ρ X (3 − ρ² XᵀX) with ρ² = 3/(1 + l + l²) is the cubic that lifts singular values in [l, 1] the most (Chen &
    Chow 2014); the next l is ½ ρ (3 − ρ²). Singular values below 1e-3 of the bound on the largest end below 1.
    """
    gram = matmul(matrix, matrix.T)
    bound = gram.abs().sum(1).max().sqrt()  # ‖M‖₂² ≤ ‖M Mᵀ‖_∞
    factor = matrix / torch.where(bound > 0, bound, torch.ones_like(bound))
    least = _FLOOR
    for _ in range(_STEPS):
        scale = (3 / (1 + least + least * least)) ** 0.5
        cubed = matmul(matmul(factor, factor.T), factor)
        factor = 1.5 * scale * factor - 0.5 * scale**3 * cubed
        least = 0.5 * scale * (3 - scale * scale)
    return factor


def _shared_right_subspace(task: SeedTask) -> torch.Tensor:
    family = task.family
    some = range(0, len(family), -(-len(family) // task.settings.energy_experts))
    train = torch.from_numpy(task.pool.rows.train)
    summed = GramSum(family.d)
    for weights in ahead(partial(family.read, number) for number in some):
        summed.add(weights[train].to(task.device).T.contiguous())
        task.advance(1 / len(some))
    return leading_eigenvectors(summed.matrix, task.rank).to(task.device)


def _mean(task: SeedTask, reference: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(reference)
    for _, weights in training_rows(task, ranks.dealt(task.family)):
        for proxy in aligned(weights.float(), reference):
            norm = proxy.norm()
            total += proxy / torch.where(norm > 0, norm, torch.ones_like(norm))
    return ranks.summed(total) / len(task.family)
