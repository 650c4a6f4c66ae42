"""Matrices rounded to integers of few bits, a scale for every group of a row: to the nearest, or with error feedback.

Rounding to the nearest takes for every group the scale of least squared error, out of a range below the one at which
nothing is clipped. Feedback is GPTQ (Frantar et al. 2022, arXiv 2210.17323), with the scale of a group chosen when its
turn comes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

_SHRINKS = tuple(1 - step / 32 for step in range(21))
_DAMPING = 0.01  # of the mean diagonal, as in the paper
_SCALE_BITS = 16  # fp16


@dataclass(frozen=True)
class Bits:
    """How a matrix is rounded: bits of an integer, columns in a group (the last may be shorter), zero points or none.

    Without zero points a value is q s with −2^(b−1) ≤ q < 2^(b−1), and s may be negative; with them (q − z) s with
    0 ≤ q, z < 2^b. Scales are fp16, zero points take b bits.
    """

    bits: int
    group: int
    zeros: bool = False

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Of `4g32`, or with zero points `4g32z`; `8` alone has groups of 32.

        Raises
        ------
        ValueError
            If it is none of these, or bits are not 2, 3, 4 or 8.
        """
        found = re.fullmatch(r"([2348])(?:g([1-9]\d*)(z?))?", text)
        if found is None:
            raise ValueError(f"bits {text!r}: expected 2, 3, 4 or 8, alone or as in 4g32 or 4g32z")
        return cls(int(found[1]), int(found[2] or 32), bool(found[3]))

    def __str__(self) -> str:
        return f"{self.bits}g{self.group}{'z' if self.zeros else ''}"

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix: integers without gaps, scales and zero points."""
        groups = -(-columns // self.group)
        each = columns * self.bits + groups * (_SCALE_BITS + (self.bits if self.zeros else 0))
        return -(-rows * each // 8)


def round_nearest(matrix: Tensor, bits: Bits, weights: Tensor | None = None) -> Tensor:
    """The values (rows, columns) as they are stored, fp32; `weights` (columns,) weigh squared errors for the scales."""
    parts = []
    for first in range(0, matrix.shape[1], bits.group):
        part = matrix[:, first : first + bits.group].float()
        weight = torch.ones(part.shape[1]) if weights is None else weights[first : first + bits.group].float()
        parts.append(_rounded(part, *_scales(part, bits, weight), bits))
    return torch.cat(parts, 1)


def round_with_feedback(matrix: Tensor, hessian: Tensor, bits: Bits) -> Tensor:
    """Q for a small tr((W − Q) H (W − Q)ᵀ): columns in turn, their errors made up for by those that follow."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return round_nearest(matrix, bits)
    damped = hessian.double() / mean
    damped.diagonal().add_(_DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    moved, found = matrix.float().clone(), torch.empty(matrix.shape)
    for first in range(0, matrix.shape[1], bits.group):
        span = slice(first, min(first + bits.group, matrix.shape[1]))
        part, factor = moved[:, span], upper[span, span]
        scales, zeros = _scales(part, bits, factor.diagonal() ** -2)
        errors = torch.empty_like(part)
        for k in range(part.shape[1]):
            column = slice(k, k + 1)
            found[:, first + k : first + k + 1] = rounded = _rounded(part[:, column], scales, zeros, bits)
            errors[:, column] = (part[:, column] - rounded) / factor[k, k]
            part[:, k + 1 :] -= errors[:, column] * factor[k, k + 1 :]
        moved[:, span.stop :] -= errors @ upper[span, span.stop :]
    return found


def _scales(part: Tensor, bits: Bits, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (rows, 1) of a group, the best of a few by the weighted squared error."""
    low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        for scale, zero in _candidates(shrink * low, shrink * high, bits):
            error = ((part - _rounded(part, scale, zero, bits)).square() * weights).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _candidates(low: Tensor, high: Tensor, bits: Bits) -> list[tuple[Tensor, Tensor]]:
    """Scales and zero points that reach from `low` to `high`: without zero points, two that turn the longer arm."""
    if bits.zeros:
        scale = _stored((high - low) / (2**bits.bits - 1))
        return [(scale, (-low / scale).round().clamp(0, 2**bits.bits - 1))]
    half = 2 ** (bits.bits - 1)
    lower, upper = (
        _stored(torch.maximum(-low / half, high / (half - 1))),
        _stored(torch.maximum(high / half, -low / (half - 1))),
    )
    return [(lower, torch.zeros_like(lower)), (-upper, torch.zeros_like(upper))]


def _stored(scale: Tensor) -> Tensor:
    return scale.half().float().clamp(min=2**-24)


def _rounded(values: Tensor, scales: Tensor, zeros: Tensor, bits: Bits) -> Tensor:
    least = 0 if bits.zeros else -(2 ** (bits.bits - 1))
    codes = ((values / scales).round() + zeros).clamp(least, least + 2**bits.bits - 1)
    return (codes - zeros) * scales
