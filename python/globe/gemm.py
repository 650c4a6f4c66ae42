"""The one place that knows devices: large products in fp32 there, small factorisations in fp64 on the CPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.errors import UsageError

# Apple's matmul returned wrong numbers from an inner dimension of 32,767 on (pytorch#195163).
_MPS_INNER = 16_384


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` value; auto is CUDA, then MPS, then the CPU.

    Raises
    ------
    UsageError
        If the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, available in there.items() if available))
    if not there[name]:
        raise UsageError(f"device {name} is not available here; use --device auto or cpu")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """Let torch and the kernels use this many CPU threads; None changes nothing."""
    if threads is not None:
        torch.set_num_threads(threads)
        kernels.set_num_threads(threads)


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right on their device, the inner dimension in chunks on MPS."""
    inner = left.shape[-1]
    chunk = _MPS_INNER if left.device.type == "mps" else inner
    total: torch.Tensor = left[..., :chunk] @ right[..., :chunk, :]
    for first in range(chunk, inner, chunk):
        total += left[..., first : first + chunk] @ right[..., first : first + chunk, :]
    return total


def mixtures(codes: NDArray[np.float64], bank: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    """B̃_i = Σ_j α_ij B_j for a batch of experts, shape (n, r, d), fp32 on the bank's device."""
    if bank.device.type == "cpu":
        composed = kernels.compose(codes.astype(np.float32), bank.numpy(), epsilon=epsilon)
        return torch.from_numpy(composed)
    weights = torch.from_numpy(codes.astype(np.float32)).to(bank.device)
    weights = torch.where(weights.abs() < epsilon, torch.zeros_like(weights), weights)
    mixed: torch.Tensor = weights @ bank.flatten(1)
    return mixed.view(len(codes), *bank.shape[1:])


def bank_gram(bank: torch.Tensor) -> NDArray[np.float64]:
    """⟨B_j, B_k⟩ for all atoms, fp32 inside a block of columns and fp64 across blocks."""
    flat = bank.flatten(1)
    total = np.zeros((len(bank), len(bank)))
    for block in flat.split(_MPS_INNER, 1):
        total += (block @ block.T).cpu().numpy().astype(np.float64)
    return (total + total.T) / 2


class GramSum:
    """Σ_b X_b X_bᵀ over blocks X_b (n, k): products in fp32 inside a chunk of columns, sums in fp64 across chunks.

    On the CPU the blocks go to the native kernel in their own dtype, which is exact for bf16 and twice as fast.
    """

    def __init__(self, count: int) -> None:
        self._native = kernels.GramAccumulator(count)
        self._device = np.zeros((count, count))

    def add(self, block: torch.Tensor) -> None:
        """Add a block, bf16, fp16 or fp32."""
        if block.device.type == "cpu":
            self._native.add(to_numpy(block))
            return
        for part in block.split(4096, 1):
            part = part.float()
            self._device += (part @ part.T).cpu().numpy().astype(np.float64)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The sum so far, (n, n), symmetric."""
        total: NDArray[np.float64] = self._native.matrix + (self._device + self._device.T) / 2
        return total


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The array of a CPU tensor; bf16, which torch does not hand over, as ml_dtypes.bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def correlations(targets: torch.Tensor, bank: torch.Tensor) -> NDArray[np.float64]:
    """⟨T_i, B_j⟩ for a batch of targets, shape (n, m), fp32 inside a block of columns and fp64 across."""
    total = np.zeros((len(targets), len(bank)))
    pairs = zip(targets.flatten(1).split(_MPS_INNER, 1), bank.flatten(1).split(_MPS_INNER, 1), strict=True)
    for left, right in pairs:
        total += (left @ right.T).cpu().numpy().astype(np.float64)
    return total


def spd_inverse(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverses of symmetric positive definite matrices through fp64 Cholesky on the CPU.

    Where a factor fails, or its diagonal says that 1/cond is below `rcond`, `ridge` times the mean diagonal
    is added first.

    Parameters
    ----------
    matrices : torch.Tensor, shape (n, r, r)
    ridge, rcond : float

    Returns
    -------
    inverses : torch.Tensor, shape (n, r, r), fp32 on the matrices' device
    ridged : torch.Tensor of bool, shape (n,)
        Which needed the ridge.
    """
    work = matrices.cpu().double()
    work = (work + work.mT) / 2
    factors, info = torch.linalg.cholesky_ex(work)
    diagonal = factors.diagonal(dim1=1, dim2=2)
    ridged = (info > 0) | ~((diagonal.amin(1) / diagonal.amax(1)) ** 2 > rcond)
    if ridged.any():
        bad = work[ridged]
        mean = bad.diagonal(dim1=1, dim2=2).mean(1)
        shift = torch.where(mean > 0, max(ridge, 1e-12) * mean, torch.ones_like(mean))
        bad = bad + shift[:, None, None] * torch.eye(work.shape[1], dtype=torch.float64)
        retried, info = torch.linalg.cholesky_ex(bad)
        if (info > 0).any():  # fp32 noise below the ridge: lift the spectrum by that noise
            noise = work.shape[1] * torch.finfo(torch.float32).eps * mean
            retried = torch.linalg.cholesky(bad + noise[:, None, None] * torch.eye(work.shape[1], dtype=torch.float64))
        factors[ridged] = retried
    inverses = torch.cholesky_inverse(factors)
    return inverses.float().to(matrices.device), ridged
