"""What a seeding method is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.checkpoint.family import Family
from globe.compute.codes import initial_codes
from globe.compute.gemm import bank_gram
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.settings import Settings

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SeedTask:
    """A pool to be seeded with a bank of `size` atoms.

    Parameters
    ----------
    pool : Pool
        The r rows that make a row-sampled proxy are `pool.rows.proxy`; r is the rank of the bank.
    size : int
        Atoms m.
    job : Job
        `blocks.proxy_bytes` is what one block of proxies, of whatever kind, may take in memory.
    scratch : Path
        A directory for files of the method's own; the caller removes it.
    advance : callable
        Called with the passes over the family, or over a scratch file of its proxies, done since the last call, as a
        fraction (0.1 is a tenth of a pass).
    """

    pool: Pool
    size: int
    job: Job
    scratch: Path
    advance: Advance

    @property
    def family(self) -> Family:
        """The expert matrices."""
        return self.pool.family

    @property
    def rank(self) -> int:
        """r, the rows of a proxy and of an atom."""
        return len(self.pool.rows.proxy)

    @property
    def settings(self) -> Settings:
        """The run's."""
        return self.job.settings

    @property
    def device(self) -> torch.device:
        """Where the large products run."""
        return self.job.device


@dataclass(frozen=True)
class Seeds:
    """A bank to start from, with codes.

    Parameters
    ----------
    bank : torch.Tensor, shape (m, r, d), fp32
        Atoms of unit Frobenius norm.
    codes : array, shape (N, m)
        Codes of the method's targets (normalised proxies for most) on the bank; not negative, no row empty.
    explained_variance : float
        Share of the targets' energy in the span of the bank.
    proxy_error : float
        Mean relative error of the targets' NNLS codes.
    """

    bank: torch.Tensor
    codes: Array
    explained_variance: float
    proxy_error: float


def code_seeds(task: SeedTask, bank: torch.Tensor, correlations: Array, there: NDArray[np.bool_]) -> Seeds:
    """Seeds from a bank and the correlations ⟨x_i, B_j⟩ (N, m) of unit targets x_i; `there` (N,) are not zero."""
    gram = bank_gram(bank)
    codes = kernels.nnls(gram, correlations).codes
    error = 1 - 2 * (codes * correlations).sum(1) + np.einsum("ij,jk,ik->i", codes, gram, codes)
    projected = np.einsum("ij,ij->i", correlations @ np.linalg.pinv(gram, hermitian=True), correlations)
    return Seeds(
        bank,
        initial_codes(gram, correlations, task.settings.init_codes),
        float(projected[there].mean()),
        float(error[there].mean()),
    )
