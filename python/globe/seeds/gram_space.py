"""Atoms that are combinations of the proxies, chosen from their N × N Gram alone (specification, J)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import GramSum, correlations, matmul
from globe.errors import GlobeError
from globe.seeds.sources import Proxies
from globe.seeds.task import Seeds, SeedTask, code_seeds

Array = NDArray[np.float64]


def seeds_from_gram(proxies: Proxies, choose: Callable[[SeedTask, Array], Array]) -> Seeds:
    """Seeds from atoms X w_j, X = [x_1 … x_N] the normalised proxies; two passes, X is never in memory.

    Parameters
    ----------
    proxies : Proxies
    choose : callable
        Given the task and C = XᵀX (N, N; the rows of zero proxies are zero), the weights w (m, N).
    """
    summed = GramSum(len(proxies.task.family))
    for _, block in proxies.blocks():
        summed.add(block)
    gram, norms, there = normalised(ranks.summed_array(summed.matrix))
    weights = choose(proxies.task, gram)
    products = gram @ weights.T
    lengths = np.sqrt(np.einsum("ji,ij->j", weights, products))
    bank = combine(proxies, weights / norms)
    unit(bank)
    return code_seeds(proxies.task, bank, products / lengths, there)


def normalised(gram: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """⟨x_i, x_k⟩ of x_i = B_i⁰/‖B_i⁰‖ from ⟨B_i⁰, B_k⁰⟩; the norms (1 for zero proxies); which are not zero."""
    energy = np.diag(gram)
    there = energy > 0
    norms = np.sqrt(np.where(there, energy, 1.0))
    return gram / np.outer(norms, norms), norms, there


def combine(proxies: Proxies, weights: Array) -> torch.Tensor:
    """Σ_i w_ji B_i⁰ for the rows of `weights` (m, N): (m, r, d), fp32 on the device; one pass."""
    task = proxies.task
    rows = torch.from_numpy(weights.astype(np.float32)).to(task.device)
    bank = torch.zeros(len(weights), task.rank, task.family.d, device=task.device)
    for span, block in proxies.blocks():
        bank[:, span] = matmul(rows, block.float()).view(len(bank), -1, task.family.d)
    return ranks.summed(bank)


def correlate(proxies: Proxies, bank: torch.Tensor) -> Array:
    """⟨B_i⁰, B_j⟩ for all proxies and atoms, (N, m); one pass."""
    total = np.zeros((len(proxies.task.family), len(bank)))
    for span, block in proxies.blocks():
        total += correlations(block.float(), bank[:, span])
    return ranks.summed_array(total)


def unit(bank: torch.Tensor) -> None:
    """Divide every atom by its Frobenius norm, in place."""
    bank /= bank.flatten(1).norm(dim=1)[:, None, None]


def signs(coefficients: Array) -> Array:
    """±1 for every column: the sign with which its positive part carries the most energy (codes are non-negative)."""
    positive = (np.maximum(coefficients, 0) ** 2).sum(0)
    return np.where(2 * positive >= (coefficients**2).sum(0), 1.0, -1.0)


def floor(gram: Array) -> float:
    """The energy that rounding in fp32 leaves in a direction that the unit proxies do not span."""
    return len(gram) * float(np.finfo(np.float32).eps)


def too_few(task: SeedTask, found: int, what: str) -> GlobeError:
    """The refusal of more atoms than there are directions."""
    directions = "1 direction" if found == 1 else f"{found} directions"
    remedy = f"--bank-size {found} or less" if found else "--method grouped-subspace, which makes no proxies"
    return GlobeError(
        f"family {task.family.name}: the proxies {what} {directions}, fewer than the {task.size} atoms asked for; "
        f"use {remedy}"
    )
