"""A left and a right factor as they are stored: in bf16, or in few bits by the rule that GloBE has for its own.

Right factors are rounded first, with feedback in the metric M; then the left ones are fitted to what came of it, and
rounded with feedback in B M Bᵀ. A product A B has r × r numbers to choose: B is taken with orthonormal rows that are
turned at random, of nine forms tried on the SmolLM2 mixture the one that loses least at 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .grid import Bits, round_with_feedback
from .task import Tensor, fit_left, stored


def factor_bytes(rows: int, inner: int, bits: Bits | None) -> int:
    """Bytes of a factor; 2 a number where it has no bits."""
    return 2 * rows * inner if bits is None else bits.bytes(rows, inner)


def largest_rank(budget: int, size: Callable[[int], int], most: int) -> int:
    """The largest rank up to `most` whose `size` in bytes is within the budget; 0 where none is."""
    fits, beyond = 0, most + 1
    while beyond - fits > 1:
        rank = (fits + beyond) // 2
        fits, beyond = (rank, beyond) if size(rank) <= budget else (fits, rank)
    return fits


def turned(atoms: Tensor, seed: int = 0) -> Tensor:
    """Atoms (m, r, d) times one r × r matrix: the mean of B_j B_jᵀ becomes I, then all are turned at random."""
    wide = atoms.double()
    factor = torch.linalg.cholesky((wide @ wide.mT).mean(0))
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(factor.shape, generator=generator, dtype=torch.float64)).Q
    found: Tensor = rotation @ torch.linalg.solve_triangular(factor, wide, upper=False)
    return found


def stored_right(right: Tensor, columns: Tensor | None, bits: Bits | None) -> Tensor:
    """A right factor or a bank (…, r, d) as stored."""
    if bits is None:
        return stored(right)
    metric = columns if columns is not None else torch.eye(right.shape[-1], dtype=torch.float64)
    return round_with_feedback(right.flatten(0, -2), metric, bits).view(right.shape)


def product(right: Tensor, weights: Tensor, columns: Tensor | None, bits: Bits | None) -> Tensor:
    """A B for a stored B (r, d), or one for every expert, and W (E, p, d): A fitted in the metric, and stored."""
    right = right.expand(len(weights), -1, -1)
    left = fit_left(right, weights, columns)
    if bits is None:
        return stored(left) @ right
    wide = right.double()
    hessians = (wide if columns is None else wide @ columns) @ wide.mT
    pairs = zip(left, hessians, strict=True)
    return torch.stack([round_with_feedback(a, hessian, bits) for a, hessian in pairs]) @ right
