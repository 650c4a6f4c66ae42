"""Seeds from groups of experts: one right subspace a group. Beyond the specification; see docs/algorithms.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.gemm import bank_gram, grams, matmul
from globe.compute.stream import ahead
from globe.errors import GlobeError
from globe.seeds.grouping import Labels, balanced_groups
from globe.seeds.task import Seeds, SeedTask
from globe.sizes.budget import SKETCH_COLUMNS

_TOGETHER = 8  # experts side by side in one Gram
_PLAIN_STEPS = 2  # before the discarded spectrum is known well enough to be filtered
_DISCARDED = 1.4  # the discarded eigenvalues lie below this times their mean, or are few
_DEPENDENT = 1e-5  # 1/cond(VᵀV) of columns that Cholesky QR would not leave orthonormal in fp32
_FLOOR = 1e-4  # of the mean eigenvalue; B Bᵀ is better conditioned than `ridge_rcond`


def grouped_subspace(task: SeedTask) -> Seeds:
    """Atom g spans the r leading right singular vectors of the experts of group g, stacked.

    Two passes. The first sketches every expert's Gram, S_i = W_iᵀ(W_i Ω)/‖W_i‖² with Ω (d × 32) Gaussian: the inner
    products ⟨S_i, S_j⟩ estimate the overlaps of the row spaces, by which experts are put into m groups of like size.
    The second sums G = Σ_i W_iᵀW_i over a group at a time and finds its leading subspace V (d × r) by subspace
    iteration. The atom is LᵀVᵀ, LLᵀ = VᵀGV: the left factors W_i B⁺ of the group then have Σ_i A_iᵀA_i = I, which puts
    the targets A_i⁺W_i of all groups on one scale. No expert is decomposed.

    Rows held out for validation are seen too, so loops from here hold none out.

    Codes are one-hot; `explained_variance` is the share of Σ_i ‖W_i‖² within the groups' subspaces, and `proxy_error`
    the rest, the experts themselves being the targets.

    Raises
    ------
    GlobeError
        If fewer than m experts are not zero.
    """
    family, size = task.family, task.size
    random = torch.Generator().manual_seed(task.settings.seed)
    overlaps, energy = _overlaps(task, random)
    there = np.flatnonzero(energy > 0)
    if len(there) < size:
        raise GlobeError(
            f"family {family.name}: {len(there)} experts are not zero, fewer than the {size} atoms asked for; "
            f"use --bank-size {len(there)} or less"
        )
    labels: Labels = np.arange(len(family)) % size  # any group will do for experts of zeros
    labels[there] = balanced_groups(overlaps[np.ix_(there, there)], size)
    bank = torch.zeros(size, task.rank, family.d, device=task.device)
    kept, mine, seen = np.zeros(size), set(ranks.share(range(size))), 0
    for group in range(size):
        start = torch.randn(family.d, task.rank, generator=random)  # of every group, whoever has it
        if group not in mine:
            continue
        members = there[labels[there] == group]
        gram, seen = _group_gram(task, members), seen + len(members)
        basis, inside = leading_subspace(gram, start.to(task.device), task.settings.subspace_steps)
        bank[group] = _atom(basis, inside)
        kept[group] = float(inside.trace())
    task.advance(1 - seen / len(family))
    ranks.summed(bank)
    explained = float(ranks.summed_array(kept).sum()) / float(energy.sum())
    return Seeds(bank, np.eye(size)[labels], explained, 1 - explained)


def _overlaps(task: SeedTask, random: torch.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """⟨S_i, S_j⟩ (N, N) and ‖W_i‖² (N,); one pass."""
    family = task.family
    probe = torch.randn(family.d, min(SKETCH_COLUMNS, family.d), generator=random).to(task.device)
    sketches = torch.zeros(len(family), probe.numel(), device=task.device)
    energy, mine = np.zeros(len(family)), ranks.dealt(family)
    for number, weights in enumerate(_experts(task, range(mine.start, mine.stop)), mine.start):
        weights = weights.float()
        energy[number] = float(weights.pow(2).sum(1).cpu().double().sum())
        sketches[number] = matmul(weights.mT, matmul(weights, probe)).flatten()
        sketches[number] *= family.d / energy[number] if energy[number] > 0 else 0.0
        task.advance(1 / len(family))
    task.advance(1 - (mine.stop - mine.start) / len(family))
    return bank_gram(ranks.summed(sketches)), ranks.summed_array(energy)


def _experts(task: SeedTask, numbers: Iterable[int]) -> Iterator[torch.Tensor]:
    """The experts of these numbers, as they are, on the device; the next one is read while one is in hand."""
    for weights in ahead(partial(task.family.read, int(number)) for number in numbers):
        yield weights.to(task.device)


def _group_gram(task: SeedTask, members: Labels) -> torch.Tensor:
    """Σ_i W_iᵀW_i (d, d) of a group, fp32."""
    total = torch.zeros(task.family.d, task.family.d, dtype=torch.float64)
    held: list[torch.Tensor] = []
    for number, weights in enumerate(_experts(task, members), 1):
        held.append(weights.mT)
        if len(held) == _TOGETHER or number == len(members):
            total += grams(torch.cat(held, 1)[None])[0].cpu().double()
            held.clear()
        task.advance(1 / len(task.family))
    return total.float().to(task.device)


def leading_subspace(gram: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis V (d, r) of about the leading eigenvectors of G, and VᵀGV (r, r) in fp64 on the CPU.

    Subspace iteration with Cholesky QR. After two plain steps V ← orth(G V) the mean of the discarded eigenvalues is
    known from traces alone, and the others are V ← orth(G V − σ_k V) with σ_k the Chebyshev nodes of the interval
    that holds the most of them: together a polynomial in G that is small there.
    """
    (width, rank), basis = start.shape, start
    total = float(gram.diagonal().sum())
    mean, filtered = 0.0, max(1, steps - _PLAIN_STEPS)
    for step in range(steps):
        image = matmul(gram, basis)
        if step == _PLAIN_STEPS and rank < width:
            mean = max(0.0, total - float((basis * image).sum())) / (width - rank)
        if step >= _PLAIN_STEPS and mean > 0:
            node = math.cos(math.pi * (2 * (step - _PLAIN_STEPS) + 1) / (2 * filtered))
            image -= _DISCARDED * mean * (1 + node) / 2 * basis
        basis = _orthonormal(image)
    inside = matmul(basis.mT, matmul(gram, basis)).cpu().double()
    return basis, (inside + inside.mT) / 2


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of the same span: V R⁻¹ with RᵀR = VᵀV in fp64; QR where V is close to dependent."""
    matrix = matrix / matrix.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    normal = matmul(matrix.mT, matrix).cpu().double()
    factor, info = torch.linalg.cholesky_ex((normal + normal.mT) / 2)
    diagonal = factor.diagonal()
    if info > 0 or not (diagonal.min() / diagonal.max()) ** 2 > _DEPENDENT:
        basis: torch.Tensor = torch.linalg.qr(matrix.cpu().double())[0]
        return basis.float().to(matrix.device)
    return matmul(matrix, _inverse_of_lower(factor).mT.float().to(matrix.device))


def _inverse_of_lower(factor: torch.Tensor) -> torch.Tensor:
    unit = torch.eye(len(factor), dtype=factor.dtype)
    inverse: torch.Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
    return inverse


def _atom(basis: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """LᵀVᵀ of unit norm; directions in which the group has next to nothing are lifted to a floor."""
    size = len(inside)
    floor = _FLOOR * float(inside.trace()) / size
    factor = torch.linalg.cholesky(inside + floor * torch.eye(size, dtype=torch.float64))
    factor /= factor.norm()
    return matmul(factor.mT.float().to(basis.device), basis.mT)
