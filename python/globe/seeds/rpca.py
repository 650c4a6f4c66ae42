"""Seeds by randomised PCA of proxies in a shared left subspace (specification, C)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe.compute.gemm import bank_gram, matmul
from globe.seeds.gram_space import combine, correlate, signs, too_few, unit
from globe.seeds.sources import projected_proxies
from globe.seeds.task import Seeds, SeedTask, code_seeds

Array = NDArray[np.float64]
_COLUMNS = 16_384


def rpca(task: SeedTask) -> Seeds:
    """The m leading left singular vectors of X, the normalised proxies A_0ᵀ W_i, by a randomised range finder.

    Halko, Martinsson & Tropp (2011): Y = X Ω with Ω (N, m + q) Gaussian, Q = orth(Y), then `power_iterations`
    times Y = X orth(XᵀQ), Q = orth(Y), and the SVD of QᵀX = Ũ Σ Vᵀ gives the atoms Q Ũ. Needs no N × N Gram:
    two passes for the proxies, and two over the scratch file for every Y and its XᵀQ.

    Raises
    ------
    GlobeError
        If the proxies span fewer than m directions.
    """
    proxies, energy = projected_proxies(task)
    settings, there = task.settings, energy > 0
    norms = np.sqrt(np.where(there, energy, 1.0))[:, None]
    width = min(len(energy), task.size + settings.oversampling)
    directions = np.random.default_rng(settings.seed).standard_normal((len(energy), width))
    for _ in range(settings.power_iterations + 1):
        bank = orthonormalise(combine(proxies, (directions / norms).T), len(energy))
        coefficients = correlate(proxies, bank) / norms
        directions = scipy.linalg.qr(coefficients, mode="economic")[0]
    if len(bank) < task.size:
        raise too_few(task, len(bank), "span")
    rotation, values, right = scipy.linalg.svd(coefficients.T, full_matrices=False)
    chosen = signs(right[: task.size].T)
    rotate(bank, (rotation[:, : task.size] * chosen).T)
    bank = bank[: task.size]
    unit(bank)
    return code_seeds(task, bank, right[: task.size].T * values[: task.size] * chosen, there)


def orthonormalise(bank: torch.Tensor, experts: int) -> torch.Tensor:
    """An orthonormal basis of the span of the atoms, in their place: pivoted Cholesky-QR twice.

    With G = ⟨B_j, B_k⟩ = PᵀLLᵀP in fp64 on the CPU the basis is L⁻¹ P B; the second time repairs what rounding in
    fp32 left of the first. Directions below that rounding, N eps of the largest, are dropped.
    """
    for _ in range(2):
        gram = bank_gram(bank)
        threshold = experts * float(np.finfo(np.float32).eps) * float(gram.diagonal().max())
        factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(gram, lower=1, tol=threshold)
        lower = np.tril(factor)[:rank, :rank]
        inverse = np.zeros((rank, len(gram)))
        inverse[:, pivots[:rank] - 1] = scipy.linalg.solve_triangular(lower, np.eye(rank), lower=True)
        rotate(bank, inverse)
        bank = bank[:rank]
    return bank


def rotate(bank: torch.Tensor, matrix: Array) -> None:
    """The first rows of the bank become `matrix` (k, m) times the bank, column block by column block."""
    flat = bank.flatten(1)
    rows = torch.from_numpy(matrix.astype(np.float32)).to(bank.device)
    for block in flat.split(_COLUMNS, 1):
        block[: len(rows)] = matmul(rows, block)
