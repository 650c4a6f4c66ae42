"""Powers of two: the scale at which weights are worked on, and values that a dtype cannot hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_USUAL = 16  # weights of a root mean square of 2^±16 stay as they are
_EVEN = 64  # factors share a power beyond this one, so that neither leaves the range of bf16


def times_power(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """X · 2^exponent in X's dtype, exact but for what leaves its range; X itself for 0."""
    while exponent:  # 2^±127 is the most that fp32 holds
        step = max(-100, min(100, exponent))
        tensor, exponent = tensor * 2.0**step, exponent - step
    return tensor


def usual_exponent(exponent: int) -> int:
    """The power of two that weights are divided by: none where they are of a usual size."""
    return exponent if abs(exponent) > _USUAL else 0


def shared(exponent: int) -> tuple[int, int]:
    """The powers that left factors and atoms take of 2^exponent."""
    atoms = exponent // 2 if abs(exponent) > _EVEN else 0
    return exponent - atoms, atoms


def saturated(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Values in a dtype, those beyond its largest at its largest, and how many they were; NaN stays."""
    converted = values.to(dtype)
    beyond = converted.isinf()
    count = int(beyond.sum())
    if count:
        limit = torch.finfo(dtype).max
        converted = values.clamp(-limit, limit).to(dtype)
    return converted, count


def saturated_each(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `saturated`, for each of n tensors: with the counts (n,) where the values lie; nothing waits for them."""
    limit = torch.finfo(dtype).max
    beyond = values.to(dtype).isinf()
    return values.clamp(-limit, limit).to(dtype), beyond.flatten(1).sum(1)


def times_powers(tensors: torch.Tensor, exponents: Sequence[int]) -> torch.Tensor:
    """X_i · 2^e_i for n tensors, as `times_power`."""
    if len(set(exponents)) == 1:
        return times_power(tensors, exponents[0])
    return torch.stack([times_power(*each) for each in zip(tensors, exponents, strict=True)])
