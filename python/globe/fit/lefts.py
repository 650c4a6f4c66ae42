"""Left factors by ordinary least squares (specification, G and H.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.compute.forms import per_core, wide_dtype
from globe.compute.gemm import matmul
from globe.compute.spd import gram_inverse
from globe.settings import Settings

_SMALL_ERROR = 1e-3  # of ‖W‖²: below it the difference of products in fp32 loses too many digits


@dataclass(frozen=True)
class LeftFit:
    """Left factors of n experts.

    Parameters
    ----------
    lefts : torch.Tensor, shape (n, p, r), fp32
        A_i.
    ridged : torch.Tensor of bool, shape (n,)
        Which experts needed a ridge.
    cross : torch.Tensor, shape (n, p, r), fp32
        W_i B̃_iᵀ.
    grams : torch.Tensor, shape (n, r, r), fp64 where the device has it
        B̃_i B̃_iᵀ.
    """

    lefts: torch.Tensor
    ridged: torch.Tensor
    cross: torch.Tensor
    grams: torch.Tensor


def fit_lefts(weights: torch.Tensor, mixtures: torch.Tensor, settings: Settings) -> LeftFit:
    """A_i = argmin ‖W_i − A_i B̃_i‖_F², by A_i = W_i B̃_iᵀ (B̃_i B̃_iᵀ)⁻¹.

    Every row of A_i depends on its own row of W_i alone, so held-out rows are regressed on B̃_i too.

    Parameters
    ----------
    weights : torch.Tensor, shape (n, p, d), fp32
    mixtures : torch.Tensor, shape (n, r, d), fp32
    settings : Settings
        `ridge` and `ridge_rcond`.
    """
    inverse, products, ridged = gram_inverse(mixtures, settings.ridge, settings.ridge_rcond)
    cross = matmul(weights, mixtures.mT)
    return LeftFit(matmul(cross, inverse), ridged, cross, products)


def squared_errors(
    weights: torch.Tensor, energies: torch.Tensor, mixtures: torch.Tensor, fit: LeftFit, lefts: torch.Tensor
) -> torch.Tensor:
    """‖W_i[k,:] − A_i[k,:] B̃_i‖² of every row, shape (n, p), for the fit's left factors or others.

    On their device, in fp64 where it has that. Where the host may look, from the products at hand: ‖w‖² − 2⟨a, w B̃ᵀ⟩ +
    a B̃B̃ᵀ aᵀ with ‖w‖² from `energies` (n, p), which for least squares is ‖w‖² − ⟨a, w B̃ᵀ⟩; experts whose error is too
    small for that, and everything on a device, from the residual.
    """
    if not per_core(weights.device):
        return row_energies(weights.float() - matmul(lefts, mixtures))
    errors = energies - (lefts * fit.cross).sum(2).double()
    if lefts is not fit.lefts or bool(fit.ridged.any()):
        slope = fit.cross - matmul(lefts, fit.grams.float())
        errors -= (lefts * slope).sum(2).double()
    for i in torch.nonzero(errors.sum(1) < _SMALL_ERROR * energies.sum(1)).flatten().tolist():
        errors[i] = row_energies((weights[i].float() - matmul(lefts[i], mixtures[i]))[None])[0]
    return errors.clamp_(min=0)


def row_energies(weights: torch.Tensor) -> torch.Tensor:
    """‖W_i[k,:]‖² of every row, shape (n, p), on their device, in fp64 where it has that."""
    norms: torch.Tensor = torch.linalg.vector_norm(weights.float(), dim=2)
    return norms.to(wide_dtype(weights.device)).square()
