"""Kernels as differentiable functions of torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from globe import kernels


def entmax(z: torch.Tensor, alpha: float = 1.5, temperature: float = 1.0) -> torch.Tensor:
    """Map logits to sparse probabilities along the last axis, differentiably: :func:`globe.kernels.entmax`.

    Parameters
    ----------
    z : Tensor, shape (..., d)
        Logits on the CPU, in any floating dtype. float32 and float64 are computed in their own precision and
        contiguous tensors are not copied; float16 and bfloat16 are computed in float32.
    alpha : float
        In (1, 2]; 2 is sparsemax.
    temperature : float
        T > 0.

    Returns
    -------
    Tensor, shape (..., d)
        Probabilities in the dtype of z. Can be differentiated once. torch.set_num_threads bounds the threads.

    Raises
    ------
    ValueError
        If z is on another device or not of a floating dtype, and wherever :func:`globe.kernels.entmax` raises.
    """
    if z.device.type != "cpu":
        raise ValueError(f"z: found a tensor on {z.device}; expected one on the CPU; pass z.cpu()")
    if not z.is_floating_point():
        raise ValueError(f"z: found {z.dtype}; expected a floating dtype; pass z.float()")
    probabilities: torch.Tensor = _Entmax.apply(z, float(alpha), float(temperature))  # type: ignore[no-untyped-call]
    return probabilities


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, alpha: float, temperature: float) -> torch.Tensor:
        threads = torch.get_num_threads()
        y = torch.from_numpy(kernels.entmax(_array(z), alpha, temperature=temperature, threads=threads))
        ctx.save_for_backward(y)
        ctx.alpha, ctx.temperature = alpha, temperature
        return y.to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (y,) = ctx.saved_tensors
        threads = torch.get_num_threads()
        dz = kernels.entmax_backward(
            y.numpy(), _array(gradient), ctx.alpha, temperature=ctx.temperature, threads=threads
        )
        return torch.from_numpy(dz).to(gradient.dtype), None, None


def _array(tensor: torch.Tensor) -> Any:
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    return tensor.detach().numpy()
