"""Seeds by tall-skinny PCA of the proxies (specification, A.3 to A.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.checkpoint import Family
from globe.errors import GlobeError
from globe.proxies import Advance, Rows, proxy_blocks

_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Seeds:
    """A bank to start from.

    Parameters
    ----------
    bank : torch.Tensor, shape (m, r, d), fp32
        Atoms of unit Frobenius norm.
    correlations : array, shape (N, m)
        ⟨x_i, B_j⟩ of the normalised proxies x_i.
    energy : array, shape (N,)
        ‖B_i⁰‖² of the proxies before they are normalised.
    explained_variance : float
        Share of the normalised proxies' energy in the m leading principal directions.
    """

    bank: torch.Tensor
    correlations: NDArray[np.float64]
    energy: NDArray[np.float64]
    explained_variance: float


def ts_pca(family: Family, rows: Rows, size: int, device: torch.device, advance: Advance) -> Seeds:
    """The m leading principal directions of the normalised proxies x_i = vec(B_i⁰)/‖B_i⁰‖.

    With X = [x_1 … x_N] and C = XᵀX = V Λ Vᵀ, atom j is X v_j λ_j^(-1/2), its sign such that the positive part
    of its coefficients carries the most energy, because codes are non-negative. Two streamed passes over the
    proxies; X is never in memory. The norms come from the diagonal of the unnormalised Gram.

    Raises
    ------
    GlobeError
        If the proxies span fewer than m directions.
    """
    gram = np.zeros((len(family), len(family)))
    for _, block in proxy_blocks(family, rows.proxy, device, _BLOCK_BYTES, advance):
        gram += kernels.gram(block.numpy()) if device.type == "cpu" else _device_gram(block)
    energy = np.diag(gram).copy()
    norms = np.sqrt(np.where(energy > 0, energy, 1.0))
    gram /= np.outer(norms, norms)
    values, vectors = scipy.linalg.eigh(gram)
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    spanned = int((values > len(family) * np.finfo(np.float32).eps * values[0]).sum())
    if spanned < size:
        raise GlobeError(
            f"family {family.name}: the proxies span {spanned} directions, fewer than the {size} atoms asked for; "
            f"use --bank-size {spanned} or less"
        )
    signs = np.where((np.maximum(vectors, 0) ** 2).sum(0) >= 0.5 * (vectors**2).sum(0), 1.0, -1.0)
    vectors = vectors * signs
    weights = torch.from_numpy((vectors / np.sqrt(values) / norms[:, None]).T.astype(np.float32)).to(device)
    bank = torch.empty(size, len(rows.proxy), family.d, device=device)
    for span, block in proxy_blocks(family, rows.proxy, device, _BLOCK_BYTES, advance):
        bank[:, span] = (weights @ block).view(size, -1, family.d)
    bank /= bank.flatten(1).norm(dim=1)[:, None, None]
    return Seeds(bank, vectors * np.sqrt(values), energy, float(values.sum() / np.trace(gram)))


def _device_gram(block: torch.Tensor) -> NDArray[np.float64]:
    total = np.zeros((len(block), len(block)))
    for part in block.split(4096, 1):
        total += (part @ part.T).cpu().numpy().astype(np.float64)
    return total
