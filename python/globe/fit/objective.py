"""The joint objective with the left factors eliminated: what a pass over experts sums, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.forms import wide_dtype
from globe.compute.gemm import correlations, scatter_add

Array = NDArray[np.float64]
_FLOOR = 1e-3  # of an expert's fitted energy: the size of its codes is free, and what they have there is rounding


@dataclass(frozen=True)
class Value:
    """f = Σ_i ‖W'_i − A_i B̃'_i‖² / Σ_i ‖W'_i‖² at its best A_i, its gradient, and blocks of its Gauss-Newton matrix.

    With Π_i the projector on the rows of B̃'_i, C_i = A_iᵀA_i and K_i = L_i (I − Π_i) L_iᵀ.

    Parameters
    ----------
    error : float
        f. Where a left factor is `ridged` it is that of the ridged one.
    bank : torch.Tensor, shape (m, r, d), fp32
        ∂f/∂B_j = −2 Σ_i α_ij A_iᵀ R_i L_iᵀ; with several ranks of this one's atoms, as `lefts`.
    codes : array, shape (N, m)
        ∂f/∂α_ij = −2 ⟨A_iᵀ R_i L_iᵀ, B_j⟩, for all atoms.
    errors : array, shape (N,)
        Every expert's share of f.
    ridged : int
    scale : float
        One over Σ_i ‖W'_i‖².
    lefts : torch.Tensor, shape (m, r, r), fp32
        2 Σ_i α_ij² t_i C_i, t_i the mean diagonal of K_i: an atom's block is about this ⊗ `columns`.
    weights : array, shape (N,)
        t_i tr C_i.
    columns : torch.Tensor, shape (d, d), fp64, on the CPU
        Σ_i tr C_i K_i over some experts of every layer, of mean diagonal one.
    curvature : torch.Tensor, shape (N, m, m), fp32 on the CPU
        Of the codes: 2 ⟨A_i B_j L_i (I − Π_i), A_i B_k L_i (I − Π_i)⟩ from a sketch of its columns, of an expert's
        atoms or, where others may come in, of all; and on its diagonal a little of ‖A_i B̃'_i‖² / ‖α_i‖².
    gram : torch.Tensor, shape (r, r), fp64 on the CPU
        B̃'_i B̃'_iᵀ over its mean diagonal: the mean over some experts.
    """

    error: float
    bank: torch.Tensor
    codes: Array
    errors: Array
    ridged: int
    scale: float
    lefts: torch.Tensor
    weights: Array
    columns: torch.Tensor
    curvature: torch.Tensor
    gram: torch.Tensor


@dataclass
class Part:
    """What n experts add: ‖W'‖² and squared errors (n,), which were ridged, and `means` t_i.

    `columns` (d, d) and `gram` (r, r) are sums over `sampled` of them.
    """

    energies: torch.Tensor
    errors: torch.Tensor
    ridged: torch.Tensor
    means: torch.Tensor
    columns: torch.Tensor
    gram: torch.Tensor
    sampled: int


@dataclass
class Sums:
    """What a pass over experts adds up to; what is kept of each is zero where it has not been seen.

    `sizes` are ‖α_i‖² of all experts. They lie where experts are worked on until they are asked for.
    """

    energies: torch.Tensor
    errors: torch.Tensor
    ridged: torch.Tensor
    means: torch.Tensor
    traces: torch.Tensor
    bank: torch.Tensor
    codes: Array
    lefts: torch.Tensor
    columns: torch.Tensor
    curvature: torch.Tensor
    gram: torch.Tensor
    sizes: torch.Tensor
    sampled: int = 0

    @staticmethod
    def none(bank: torch.Tensor, codes: Array) -> Sums:
        """Of no expert yet."""
        (count, atoms), (_, r, d), device = codes.shape, bank.shape, bank.device
        wide = wide_dtype(device)
        return Sums(
            torch.zeros(count, dtype=wide, device=device),
            torch.zeros(count, dtype=wide, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, device=device),
            torch.zeros_like(bank),
            np.zeros((count, atoms)),
            torch.zeros(atoms, r, r, device=device),
            torch.zeros(d, d, device=device),
            torch.zeros(count, atoms, atoms, device=device),
            torch.zeros(r, r, dtype=wide, device=device),
            torch.from_numpy(np.square(codes).sum(1).astype(np.float32)).to(device),
        )

    def add(self, numbers: slice, part: Part) -> None:
        """Add some experts."""
        self.energies[numbers], self.errors[numbers] = part.energies, part.errors
        self.ridged[numbers], self.means[numbers] = part.ridged, part.means
        if part.sampled:
            self.columns += part.columns
            self.gram += part.gram
            self.sampled += part.sampled

    def gather(self, span: slice, point: tuple[torch.Tensor, Array], slopes: torch.Tensor, lefts: torch.Tensor) -> None:
        """Add to the atoms what experts in hand, which have been added, mean for them.

        Parameters
        ----------
        span : slice
        point : tuple
            The bank, and the codes of all experts.
        slopes : torch.Tensor, shape (n, r, d)
            A_iᵀ R_i L_iᵀ.
        lefts : torch.Tensor, shape (n, r, r)
            C_i; both are overwritten.
        """
        bank, codes = point
        self.traces[span] = lefts.diagonal(dim1=1, dim2=2).sum(1)
        self.codes[span] = correlations(slopes, bank)
        scatter_add(codes[span], slopes, self.bank, torch.empty_like(slopes))
        lefts.mul_(self.means[span, None, None])
        scatter_add(np.square(codes[span]), lefts, self.lefts, torch.empty_like(lefts))
        size = self.sizes[span]
        fitted = (self.energies[span] - self.errors[span]).clamp(min=0).to(self.curvature)
        floor = torch.where(size > 0, _FLOOR * fitted / size, torch.zeros_like(size))
        self.curvature[span].diagonal(dim1=1, dim2=2).add_(floor[:, None])

    def merge(self, other: Sums) -> None:
        """Add the sums over other experts."""
        self.ridged |= other.ridged
        self.codes += other.codes
        self.sampled += other.sampled
        for name in ("energies", "errors", "means", "traces", "bank", "lefts", "columns", "curvature", "gram"):
            getattr(self, name).add_(getattr(other, name))

    def over_ranks(self, everything: bool = True) -> Sums:
        """The sums over the experts of all ranks, those of atoms for the atoms of this one.

        Without `everything` those alone that f and the Gram matrix need.
        """
        names = ["energies", "errors", "gram"]
        if everything:
            self.codes = ranks.summed_array(self.codes)
            self.bank, self.lefts = ranks.scattered(self.bank), ranks.scattered(self.lefts)
            names += ["means", "traces", "columns", "curvature"]
        for name in names:
            ranks.summed(getattr(self, name))
        self.ridged = ranks.summed(self.ridged.to(torch.uint8)).bool()
        self.sampled = int(ranks.summed_array(np.array([self.sampled]))[0])
        return self

    def value(self) -> Value:
        """f and the rest of all experts; takes the memory of the sums."""
        energy = float(self.energies.sum())
        scale = 1 / energy if energy > 0 else 0.0
        errors: Array = self.errors.cpu().double().numpy() * scale
        mean = float(self.columns.diagonal().mean())
        columns = self.columns.cpu().double() / mean if mean > 0 else torch.eye(len(self.columns), dtype=torch.float64)
        return Value(
            ranks.agreed(float(errors.sum())),
            self.bank.mul_(-2 * scale),
            self.codes * (-2 * scale),
            errors,
            int(self.ridged.sum()),
            scale,
            self.lefts.mul_(2 * scale),
            (self.means * self.traces).cpu().double().numpy(),
            columns,
            self.curvature.mul_(2 * scale).cpu(),
            self.gram.cpu().double() / max(self.sampled, 1),
        )
