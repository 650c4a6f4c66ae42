"""Factors and inverses of symmetric positive definite matrices of order r, in batches, with a ridge only where needed.

All is done where the matrices are, in fp64, or in fp32 on a device without fp64. What needs a ridge is decided by
`torch.where`; only where the host may look for nothing (:func:`globe.compute.forms.per_core`) does it, to be spared
work that would change nothing.
"""

from __future__ import annotations

import torch

from globe.compute.forms import per_core, wide_dtype
from globe.compute.gemm import grams, lower_gram, lower_times

# Of the mean diagonal: a ridge below it is lost in the rounding of the matrix.
_LEAST_RIDGE = {torch.float64: 1e-9, torch.float32: 1e-4}
_SHIFT = 4 * torch.finfo(torch.float32).eps  # of the norm of a Gram matrix: what its factor in fp32 rounds
# Of X Xᵀ, for rows that are to be orthonormal: 1/cond of what is dependent, and the ridge that it takes.
_DEPENDENT, _DEPENDENT_RIDGE = 1e-12, 1e-9
_RESOLVED = 8.0  # times the product of both shifts
_LIFTS = tuple(16.0**-power for power in range(4, -1, -1))  # of the norm


def spd_inverse(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverses of symmetric positive definite matrices through Cholesky factors.

    Where a factor fails, or its diagonal says that 1/cond is below `rcond`, `ridge` times the mean diagonal is added
    first. Where that fails too, noise is larger than the ridge: twice the first of `_LIFTS` with which the matrix
    is definite is added.

    Parameters
    ----------
    matrices : torch.Tensor, shape (n, r, r)
        Their lower triangles are read.
    ridge, rcond : float

    Returns
    -------
    inverses : torch.Tensor, shape (n, r, r), fp32 on the matrices' device
    ridged : torch.Tensor of bool, shape (n,), there
        Which needed the ridge.
    """
    wide = matrices.to(wide_dtype(matrices.device))
    factors, ridged, failed = _factors(wide, ridge, max(rcond, wide.shape[1] * torch.finfo(wide.dtype).eps))
    return torch.cholesky_inverse(_lifted(wide, factors, failed)).float(), ridged


def spd_factor_inverse(matrices: torch.Tensor, ridge: float, rcond: float) -> torch.Tensor:
    """C⁻¹ (n, r, r), fp32, of the Cholesky factors C of matrices that are ridged as for `spd_inverse`."""
    wide = matrices.to(wide_dtype(matrices.device))
    factors, _, failed = _factors(wide, ridge, max(rcond, wide.shape[1] * torch.finfo(wide.dtype).eps))
    factors = _lifted(wide, factors, failed)
    found: torch.Tensor = torch.linalg.solve_triangular(factors, _identities(factors), upper=False).float()
    return found


def gram_inverse(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverses of X_i X_iᵀ, with a ridge as for `spd_inverse`, and what they are of.

    Parameters
    ----------
    matrices : torch.Tensor, shape (n, r, c), fp32
        X_i.
    ridge, rcond : float

    Returns
    -------
    inverses : torch.Tensor, shape (n, r, r), fp32 on the matrices' device
    products : torch.Tensor, shape (n, r, r), there, fp64 where the device has it
        X_i X_iᵀ, without a ridge.
    ridged : torch.Tensor of bool, shape (n,), there
    """
    products = grams(matrices)
    if products.dtype == torch.float64:
        factors, ridged, _ = _factors(products, ridge, rcond)
        return torch.cholesky_inverse(factors).float(), products, ridged
    inner, _, ridged = _orthonormal_rows(matrices, ridge, rcond)
    return inner.mT @ inner, products, ridged


def row_basis(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the rows of matrices, by Cholesky factors of their Gram matrices in fp64.

    A Gram matrix in fp32 squares the condition: of 4,000 it leaves noise in what is fitted to the rows. Where the
    device has no fp64 the factors are those of CholeskyQR, shifted and then twice.

    Parameters
    ----------
    matrices : torch.Tensor, shape (n, r, d), fp32
    ridge, rcond : float
        As for `spd_inverse`, of X Xᵀ.

    Returns
    -------
    inner : torch.Tensor, shape (n, r, r), fp32
        C⁻¹, C Cᵀ being X Xᵀ, ridged where that is needed.
    basis : torch.Tensor, shape (n, r, d), fp32
        Q = C⁻¹ X.
    ridged : torch.Tensor of bool, shape (n,)
    """
    if wide_dtype(matrices.device) == torch.float32:
        return _orthonormal_rows(matrices, ridge, rcond)
    wide = matrices.double()
    factors, ridged, _ = _factors(lower_gram(wide), ridge, rcond)
    inner = torch.linalg.solve_triangular(factors, _identities(factors), upper=False)
    return inner.float(), lower_times(inner, wide).float(), ridged


def orthonormal_rows(matrices: torch.Tensor) -> torch.Tensor:
    """T⁻¹ X, with T Tᵀ = X Xᵀ and T lower triangular: the rows of X made orthonormal one after another (Gram–Schmidt).

    X (n, r, d), and what is found, are fp32; products are fp64 where the device has it. Where X has dependent rows,
    10⁻⁹ of the mean diagonal is added to X Xᵀ, or the identity if X is zero.
    """
    return row_basis(matrices, _DEPENDENT_RIDGE, _DEPENDENT)[1]


def ridged_factor(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of a semidefinite matrix (r, r; fp64) with `ridge` times its mean diagonal added."""
    shifted = _shifted(matrix[None], torch.ones(1, dtype=torch.bool, device=matrix.device), ridge)
    factor, info = torch.linalg.cholesky_ex(shifted)
    return _lifted(shifted, factor, info > 0)[0]


def _factors(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cholesky factors as for `spd_inverse`, which took the ridge, and which failed even so: noise is above it.

    A Gram matrix in fp64 never fails so, its rounding being below `_LEAST_RIDGE`.
    """
    factors, info = torch.linalg.cholesky_ex(matrices)
    diagonal = factors.diagonal(dim1=1, dim2=2)
    ridged = (info > 0) | ~((diagonal.amin(1) / diagonal.amax(1)).square() > rcond)
    if per_core(matrices.device) and not bool(ridged.any()):
        return factors, ridged, ridged
    factors, info = torch.linalg.cholesky_ex(_shifted(matrices, ridged, ridge))
    return factors, ridged, info > 0


def _shifted(matrices: torch.Tensor, which: torch.Tensor, ridge: float) -> torch.Tensor:
    """Those matrices plus `ridge` times their mean diagonal, or the identity where that is not positive."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
    amount = torch.where(mean > 0, max(ridge, _LEAST_RIDGE[matrices.dtype]) * mean, torch.ones_like(mean))
    return _plus_diagonal(matrices, torch.where(which, amount, torch.zeros_like(amount)))


def _lifted(matrices: torch.Tensor, factors: torch.Tensor, failed: torch.Tensor) -> torch.Tensor:
    """The factors, those that failed with twice the first lift of the spectrum that makes the matrix definite."""
    looks = per_core(matrices.device)
    if looks and not bool(failed.any()):
        return factors
    norm = torch.linalg.vector_norm(matrices.flatten(1), dim=1)
    lift, pending = torch.zeros_like(norm), failed
    for share in _LIFTS:
        trial = torch.where(pending, share * norm, torch.zeros_like(norm))
        definite = torch.linalg.cholesky_ex(_plus_diagonal(matrices, trial))[1] == 0
        lift = torch.where(pending & definite, 2 * share * norm, lift)
        pending = pending & ~definite
        if looks and not bool(pending.any()):
            break
    lifted = torch.linalg.cholesky_ex(_plus_diagonal(matrices, lift))[0]
    return torch.where(failed[:, None, None], lifted, factors)


def _plus_diagonal(matrices: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """X_i + a_i I."""
    shifted = matrices.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(amounts[:, None])
    return shifted


def _identities(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).expand_as(like)


def _orthonormal_rows(
    matrices: torch.Tensor, ridge: float, rcond: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `row_basis` finds, in fp32 throughout: CholeskyQR twice shifted, and once with the ridge where it is needed.

    Fukaya et al. (2020): the shifted factors of s I + X Xᵀ, s of the size of what fp32 rounds, leave rows of a
    condition that the last Cholesky factor of their Gram matrix makes orthonormal (Yamamoto et al., 2015). Directions
    below the product of both shifts are not resolved: what has any takes the ridge, λ I becoming λ K Kᵀ for the rows
    K X in hand.
    """
    peak = matrices.abs().amax((1, 2))
    there = peak > 0
    scale = torch.where(there, peak, torch.ones_like(peak)).reciprocal()
    mean = (matrices * scale[:, None, None]).square().sum(2).mean(1)
    scale = (scale * torch.where(there, mean, torch.ones_like(mean)).rsqrt())[:, None, None]
    basis, inner = matrices * scale, _identities(matrices[:, :, :1].expand(-1, -1, matrices.shape[1]))
    pivots, resolution, failed = torch.ones_like(basis[:, :, 0]), torch.ones_like(mean), ~there
    for _ in range(2):
        normal = grams(basis)
        shift = _SHIFT * torch.linalg.vector_norm(normal.flatten(1), dim=1)
        shift = torch.where(there, shift, torch.ones_like(shift))
        basis, inner, diagonal, missed = _orthonormal_step(basis, inner, _plus_diagonal(normal, shift))
        pivots, resolution, failed = pivots * diagonal, resolution * shift, failed | missed
    least, most = pivots.amin(1).square(), pivots.amax(1).square()
    ridged = failed | ~(least > rcond * most) | ~(least > _RESOLVED * resolution)
    ridge_there = torch.where(there, resolution.clamp(min=ridge), torch.ones_like(mean))
    amount = torch.where(ridged, ridge_there, torch.zeros_like(mean))[:, None, None]
    basis, inner, _, missed = _orthonormal_step(basis, inner, grams(basis) + amount * (inner @ inner.mT))
    return inner * scale, basis, ridged | missed


def _orthonormal_step(
    basis: torch.Tensor, inner: torch.Tensor, normal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """C⁻¹ times the basis and the inner factor, C Cᵀ being the normal matrix; C's diagonal; where C was not found.

    There C is the identity times what makes the rows no longer than one.
    """
    factors, info = torch.linalg.cholesky_ex(normal)
    missed = info > 0
    size = normal.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1.0).sqrt()
    factors = torch.where(missed[:, None, None], _identities(normal) * size[:, None, None], factors)
    both = torch.cat([basis, inner], 2)
    solved = torch.linalg.solve_triangular(factors, both, upper=False)
    basis, inner = solved.split([basis.shape[2], inner.shape[2]], 2)
    return basis, inner, factors.diagonal(dim1=1, dim2=2), missed
