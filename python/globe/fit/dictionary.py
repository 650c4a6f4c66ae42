"""The dictionary step: the bank that fits given codes (specification, H.2; method of optimal directions)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.blocks import BLOCKS, Blocks
from globe.compute.gemm import matmul, mixtures, scatter_add
from globe.compute.passes import Engine, engine, within
from globe.compute.spd import spd_inverse
from globe.sizes.budget import EXPERTS_AT_ONCE

Array = NDArray[np.float64]
_ROW_BLOCK_BYTES = 64 << 20


def mod(codes: Array, right_side: torch.Tensor, bank: torch.Tensor, ridge: float) -> torch.Tensor:
    """B = argmin Σ_i ‖T_i − Σ_j α_ij B_j‖² + λ Σ_j ‖B_j‖², from the right side Σ_i α_ij T_i.

    Engan, Aase & Husøy (1999). λ is `ridge` times the mean diagonal of Σ_i α_i α_iᵀ. Atoms that no expert
    uses keep their place.

    Parameters
    ----------
    codes : array, shape (N, m)
    right_side : torch.Tensor, shape (m, r, d)
        Is overwritten: the result takes its memory.
    bank : torch.Tensor, shape (m, r, d)
    ridge : float
    """
    normal = codes.T @ codes
    used = np.flatnonzero(np.diag(normal) > 0)
    inner = normal[np.ix_(used, used)]
    inner[np.diag_indices_from(inner)] += ridge * np.diag(inner).mean()
    inverse = torch.from_numpy(scipy.linalg.pinvh(inner).astype(np.float32)).to(bank.device)
    rows = max(1, _ROW_BLOCK_BYTES // (4 * len(bank) * bank.shape[2]))
    for span in spans(bank.shape[1], rows):
        part = right_side[:, span]
        solved = bank[:, span].clone()
        solved[used] = matmul(inverse, part[used].flatten(1)).view(len(used), *part.shape[1:])
        right_side[:, span] = solved
    return right_side


@dataclass(frozen=True)
class Equations:
    """The normal equations of the exact dictionary step, as far as a pass over the experts makes them.

    Parameters
    ----------
    codes : array, shape (n, m)
        Of the experts of this rank.
    left_grams : torch.Tensor, shape (n, r, r), fp32 or bf16
        A_iᵀA_i. In bf16, products inside the iteration are bf16 products: they change the change of the bank by
        less than a hundredth, which is below what a few CG steps leave.
    residual : torch.Tensor, shape (m, r, d), fp32
        Σ_i α_ij (A_iᵀW_i − A_iᵀA_i Σ_k α_ik B_k), at the bank as it is; in a metric that of `mod_metric`. A step
        overwrites it: its result takes the memory.
    first : int
        The number of the rank's first expert.
    """

    codes: Array
    left_grams: torch.Tensor
    residual: torch.Tensor
    first: int = 0


@dataclass(frozen=True)
class Solving:
    """How the exact step is solved.

    Parameters
    ----------
    ridge : float
        λ_j over the mean diagonal of the atom's block.
    steps : int
        CG steps of every block; fewer are taken once the residual is at rounding.
    over_relaxation : float
        Fraction of its own step by which the result goes past the solution.
    """

    ridge: float
    steps: int
    over_relaxation: float = 0.0


def mod_exact(equations: Equations, bank: torch.Tensor, how: Solving, blocks: Blocks = BLOCKS) -> torch.Tensor:
    """B = argmin Σ_i ‖W_i − A_i Σ_j α_ij B_j‖² + Σ_j λ_j ‖B_j‖², by preconditioned conjugate gradients from `bank`.

    The normal equations are Σ_i α_ij A_iᵀA_i (Σ_k α_ik B_k) + λ_j B_j = Σ_i α_ij A_iᵀW_i: an equation of its own
    for every column of the atoms, so blocks of columns are solved one after the other. What is solved for is the
    change of the bank, from the residual at the bank as it is. The preconditioner is the diagonal block
    Σ_i α_ij² A_iᵀA_i + λ_j I of every atom; λ_j is `how.ridge` times that block's mean diagonal. Needs no pass over W.

    Parameters
    ----------
    equations : Equations
    bank : torch.Tensor, shape (m, r, d), fp32
    how : Solving
    blocks : Blocks
        `columns` in hand at a time.
    """
    codes, left_grams, residual = equations.codes, equations.left_grams, equations.residual
    rank = bank.shape[1]
    with engine(bank.device) as workers:
        inverse, shift, used = left_blocks(codes**2, left_grams, how.ridge, workers)
        for span in spans(bank.shape[2], blocks.columns):
            start = bank[:, :, span].contiguous()
            mixed, products = (
                torch.empty(EXPERTS_AT_ONCE, rank, start.shape[2], dtype=left_grams.dtype, device=bank.device)
                for _ in range(2)
            )
            room = torch.empty(EXPERTS_AT_ONCE, rank, start.shape[2], device=bank.device)

            def operator(
                atoms: torch.Tensor,
                mixed: torch.Tensor = mixed,
                products: torch.Tensor = products,
                room: torch.Tensor = room,
            ) -> torch.Tensor:
                total = ridged_start(shift, atoms)
                atoms = atoms.to(left_grams.dtype)
                for some in spans(len(codes), EXPERTS_AT_ONCE):
                    mixtures(codes[some], atoms, mixed)

                    def apply(part: slice, some: slice = some) -> None:
                        torch.bmm(left_grams[within(some, part)], mixed[part], out=products[part])

                    workers.run(apply, some.stop - some.start)
                    scatter_add(codes[some], products[: some.stop - some.start], total, room)
                return ranks.summed(total)

            change = conjugate_gradients(
                operator, lambda vector: matmul(inverse, vector), residual[:, :, span] - shift * start, how.steps
            )
            change = torch.where(used, (1 + how.over_relaxation) * change, torch.zeros_like(change))
            residual[:, :, span] = start + change
    return residual


def ridged_start(shift: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """λ_j B_j, where sums over the experts of all ranks begin: at one of them, zero at the others."""
    return shift * atoms if ranks.rank() == 0 or ranks.size() == 1 else torch.zeros_like(atoms)


def left_blocks(
    weights: Array, left_grams: torch.Tensor, ridge: float, workers: Engine
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ_i w_ij A_iᵀA_i + λ_j I)⁻¹ (m, r, r) of weights (N, m); λ_j and whether any expert uses the atom, (m, 1, 1)."""
    rank = left_grams.shape[1]
    blocks = torch.zeros(weights.shape[1], rank, rank, device=left_grams.device)
    room = torch.empty(EXPERTS_AT_ONCE, rank, rank, device=left_grams.device)
    for some in spans(len(weights), EXPERTS_AT_ONCE):
        scatter_add(weights[some], left_grams[some], blocks, room)
    ranks.summed(blocks)
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
    used = ridge * mean > 0 if ridge > 0 else mean > 0
    shift = torch.where(used, ridge * mean, torch.ones_like(mean))
    blocks.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    for some in spans(len(blocks), EXPERTS_AT_ONCE):

        def invert(part: slice, some: slice = some) -> None:
            mine = within(some, part)
            blocks[mine] = spd_inverse(blocks[mine], ridge=1e-6, rcond=1e-12)[0]

        workers.run(invert, some.stop - some.start)
    return blocks, shift[:, None, None], used[:, None, None]


def conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor],
    precondition: Callable[[torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The solution from zero; `residual` is the right side at first and is overwritten."""
    solution = torch.zeros_like(residual)
    direction = preconditioned = precondition(residual)
    strength = _dot(residual, preconditioned)
    floor = torch.finfo(torch.float32).eps ** 2 * strength
    for step_number in range(steps):
        if strength <= floor:
            break
        image = operator(direction)
        curvature = _dot(direction, image)
        if curvature <= 0:  # rounding has the last word
            break
        step = strength / curvature
        solution.add_(direction, alpha=step)
        if step_number == steps - 1:
            break
        residual.sub_(image, alpha=step)
        preconditioned = precondition(residual)
        previous, strength = strength, _dot(residual, preconditioned)
        direction = preconditioned.add(direction, alpha=strength / previous)
    return solution


def unit_atoms(bank: torch.Tensor, codes: Array) -> tuple[torch.Tensor, Array]:
    """Atoms of unit Frobenius norm, in place, and the codes rescaled so that every product stays the same."""
    norms = torch.linalg.vector_norm(bank.flatten(1), dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return bank.div_(norms[:, None, None]), codes * norms.cpu().double().numpy()


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    """⟨X, Y⟩, in fp32 inside an atom and in fp64 across them."""
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]
    return ranks.agreed(float(torch.stack(products).cpu().double().sum()))


def spans(count: int, size: int) -> Iterator[slice]:
    """0 to `count` in slices of at most `size`."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
