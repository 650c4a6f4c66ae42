"""How a device is worked on: an expert to a core with the native kernels, or batches of experts with torch's own."""

from __future__ import annotations

import torch

_PER_CORE = {"cpu"}
_WITHOUT_FP64 = {"mps"}


def per_core(device: torch.device) -> bool:
    """Whether experts are worked on one to a core, where the host may look at any value at no cost.

    Elsewhere a look waits for all that was asked of the device: decisions are made there, by `torch.where`.
    """
    return device.type in _PER_CORE


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of Gram matrices, factors and sums: fp64, or fp32 where the device has no other."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64
