"""The dictionary step: the bank that fits given codes (specification, H.2; method of optimal directions)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe.gemm import matmul, spd_inverse

Array = NDArray[np.float64]
_BATCH_BYTES = 256 << 20


def mod(codes: Array, right_side: torch.Tensor, bank: torch.Tensor, ridge: float) -> torch.Tensor:
    """B = argmin Σ_i ‖T_i − Σ_j α_ij B_j‖² + λ Σ_j ‖B_j‖², from the right side Σ_i α_ij T_i.

    Engan, Aase & Husøy (1999). λ is `ridge` times the mean diagonal of Σ_i α_i α_iᵀ. Atoms that no expert
    uses keep their place.

    Parameters
    ----------
    codes : array, shape (N, m)
    right_side, bank : torch.Tensor, shape (m, r, d)
    ridge : float
    """
    normal = codes.T @ codes
    used = np.flatnonzero(np.diag(normal) > 0)
    inner = normal[np.ix_(used, used)]
    inner[np.diag_indices_from(inner)] += ridge * np.diag(inner).mean()
    inverse = scipy.linalg.pinvh(inner)
    solved = torch.from_numpy(inverse.astype(np.float32)).to(bank.device) @ right_side[used].flatten(1)
    updated = bank.clone()
    updated[used] = solved.view(len(used), *bank.shape[1:])
    return updated


def mod_exact(
    codes: Array, left_grams: torch.Tensor, right_side: torch.Tensor, bank: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    """B = argmin Σ_i ‖W_i − A_i Σ_j α_ij B_j‖² + Σ_j λ_j ‖B_j‖², by preconditioned conjugate gradients from `bank`.

    The normal equations are Σ_i α_ij A_iᵀA_i (Σ_k α_ik B_k) + λ_j B_j = Σ_i α_ij A_iᵀW_i. The preconditioner is
    the diagonal block Σ_i α_ij² A_iᵀA_i + λ_j I of every atom; λ_j is `ridge` times that block's mean diagonal.
    Needs no pass over W.

    Parameters
    ----------
    codes : array, shape (N, m)
    left_grams : torch.Tensor, shape (N, r, r), fp32
        A_iᵀA_i.
    right_side, bank : torch.Tensor, shape (m, r, d), fp32
    ridge : float
    steps : int
        CG steps; fewer are taken once the residual is at rounding.
    """
    size, rank, width = bank.shape
    weights = torch.from_numpy(codes.astype(np.float32)).to(bank.device)
    blocks = (weights.T.pow(2) @ left_grams.flatten(1)).view(size, rank, rank)
    shift = ridge * blocks.diagonal(dim1=1, dim2=2).mean(1)
    used = shift > 0 if ridge > 0 else blocks.diagonal(dim1=1, dim2=2).mean(1) > 0
    shift = torch.where(used, shift, torch.ones_like(shift))
    blocks.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    inverse, _ = spd_inverse(blocks, ridge=1e-6, rcond=1e-12)
    batch = max(1, _BATCH_BYTES // (4 * rank * width))

    def operator(atoms: torch.Tensor) -> torch.Tensor:
        total = shift[:, None] * atoms.flatten(1)
        for span in _spans(len(weights), batch):
            mixed = (weights[span] @ atoms.flatten(1)).view(-1, rank, width)
            total += weights[span].T @ matmul(left_grams[span], mixed).flatten(1)
        return total.view_as(atoms)

    solution = bank.clone()
    residual = right_side - operator(solution)
    direction = preconditioned = matmul(inverse, residual)
    strength = _dot(residual, preconditioned)
    floor = torch.finfo(torch.float32).eps ** 2 * _dot(right_side, matmul(inverse, right_side))
    for _ in range(steps):
        if strength <= floor:
            break
        image = operator(direction)
        step = strength / _dot(direction, image)
        solution += step * direction
        residual -= step * image
        preconditioned = matmul(inverse, residual)
        previous, strength = strength, _dot(residual, preconditioned)
        direction = preconditioned + (strength / previous) * direction
    return torch.where(used[:, None, None], solution, bank)


def unit_atoms(bank: torch.Tensor, codes: Array) -> tuple[torch.Tensor, Array]:
    """Atoms of unit Frobenius norm, the codes rescaled so that every product stays the same."""
    norms = bank.flatten(1).norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return bank / norms[:, None, None], codes * norms.cpu().double().numpy()


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(sum((a * b).sum().cpu().double() for a, b in zip(left, right, strict=True)))


def _spans(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
