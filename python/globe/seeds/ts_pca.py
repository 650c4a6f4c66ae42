"""Seeds by tall-skinny PCA of the proxies (specification, A.3 to A.5)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.errors import GlobeError
from globe.proxies import proxy_blocks
from globe.seeds.task import Seeds, SeedTask, code_seeds


def ts_pca(task: SeedTask) -> Seeds:
    """The m leading principal directions of the normalised proxies x_i = vec(B_i⁰)/‖B_i⁰‖.

    With X = [x_1 … x_N] and C = XᵀX = V Λ Vᵀ, atom j is X v_j λ_j^(-1/2), its sign such that the positive part
    of its coefficients carries the most energy, because codes are non-negative. Two streamed passes over the
    proxies; X is never in memory. The norms come from the diagonal of the unnormalised Gram.

    Raises
    ------
    GlobeError
        If the proxies span fewer than m directions.
    """
    family, rows, size = task.family, task.rows, task.size
    gram = np.zeros((len(family), len(family)))
    for span, block in proxy_blocks(family, rows.proxy, task.device, task.block_bytes):
        gram += kernels.gram(block.numpy()) if task.device.type == "cpu" else _device_gram(block)
        task.advance((span.stop - span.start) / task.rank)
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
    weights = torch.from_numpy((vectors / np.sqrt(values) / norms[:, None]).T.astype(np.float32)).to(task.device)
    bank = torch.empty(size, task.rank, family.d, device=task.device)
    for span, block in proxy_blocks(family, rows.proxy, task.device, task.block_bytes):
        bank[:, span] = (weights @ block).view(size, -1, family.d)
        task.advance((span.stop - span.start) / task.rank)
    bank /= bank.flatten(1).norm(dim=1)[:, None, None]
    return code_seeds(task, bank, vectors * np.sqrt(values), energy > 0)


def _device_gram(block: torch.Tensor) -> NDArray[np.float64]:
    total = np.zeros((len(block), len(block)))
    for part in block.split(4096, 1):
        total += (part @ part.T).cpu().numpy().astype(np.float64)
    return total
