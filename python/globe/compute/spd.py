"""Symmetric positive definite matrices of order r: factors and inverses in fp64, with a ridge only where needed."""

from __future__ import annotations

import torch


def spd_inverse(matrices: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverses of symmetric positive definite matrices through fp64 Cholesky on the CPU, one after the other.

    Where a factor fails, or its diagonal says that 1/cond is below `rcond`, `ridge` times the mean diagonal
    is added first.

    Parameters
    ----------
    matrices : torch.Tensor, shape (n, r, r)
        Their lower triangles are read.
    ridge, rcond : float

    Returns
    -------
    inverses : torch.Tensor, shape (n, r, r), fp32 on the matrices' device
    ridged : torch.Tensor of bool, shape (n,)
        Which needed the ridge.
    """
    inverses: torch.Tensor = torch.empty(matrices.shape, dtype=torch.float32)
    ridged = torch.zeros(len(matrices), dtype=torch.bool)
    for number, matrix in enumerate(matrices):
        factor, ridged[number] = spd_factor(matrix.cpu().double(), ridge, rcond)
        inverses[number] = torch.cholesky_inverse(factor)
    return inverses.to(matrices.device), ridged


def spd_factor(matrix: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, bool]:
    """The Cholesky factor of a matrix (r, r; fp64) as for `spd_inverse`, and whether it took the ridge."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if info > 0 or not (diagonal.min() / diagonal.max()) ** 2 > rcond:
        return ridged_factor(matrix, ridge), True
    return factor, False


def row_basis(matrix: torch.Tensor, ridge: float, rcond: float) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """An orthonormal basis of the rows of a matrix, by Cholesky of its Gram matrix in fp64.

    A Gram matrix in fp32 squares the condition: of 4,000 it leaves noise in what is fitted to the rows.

    Parameters
    ----------
    matrix : torch.Tensor, shape (r, d), fp32
    ridge, rcond : float
        As for `spd_inverse`, of X Xᵀ.

    Returns
    -------
    inner : torch.Tensor, shape (r, r), fp32
        C⁻¹, C Cᵀ being X Xᵀ, ridged where that is needed.
    basis : torch.Tensor, shape (r, d), fp32
        Q = C⁻¹ X.
    ridged : bool
    """
    wide = matrix.double() if matrix.device.type != "mps" else matrix.cpu().double()
    factor, ridged = spd_factor((wide @ wide.mT).cpu(), ridge, rcond)
    identity = torch.eye(len(factor), dtype=torch.float64)
    inner = torch.linalg.solve_triangular(factor, identity, upper=False).float()
    basis = torch.linalg.solve_triangular(factor.to(wide.device), wide, upper=False).float()
    return inner.to(matrix.device), basis.to(matrix.device), ridged


def ridged_factor(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of a semidefinite matrix (r, r; fp64) with `ridge` times its mean diagonal added."""
    mean = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=torch.float64)
    shifted = matrix + (max(ridge, 1e-12) * mean if mean > 0 else 1.0) * identity
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(shifted)
    if info > 0:  # noise below the ridge: lift the spectrum by it, and by that of fp32
        lowest = float(torch.linalg.eigvalsh(shifted)[0])
        lift = max(0.0, -2 * lowest) + len(matrix) * torch.finfo(torch.float32).eps * mean
        factor = torch.linalg.cholesky(shifted + lift * identity)
    return factor
