"""Factors rounded to integers with a scale a group: to the nearest, or with feedback of the errors made so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.compute.forms import wide_dtype
from globe.compute.gemm import matmul
from globe.compute.spd import ridged_factor
from globe.errors import GlobeError

_LEAST_SCALE = torch.finfo(torch.bfloat16).tiny
_DAMPING = 1e-4  # of the mean diagonal of a Hessian
_ROWS = 32  # of an atom that are rounded before those behind them move
_FINE = 8  # bits from which nothing is gained by a smaller scale
_SHARES = torch.linspace(0.65, 1.0, 8).tolist()  # of the scale that takes the farthest value to the end of the grid


@dataclass(frozen=True)
class Rounded:
    """A matrix as integers q and scales s: the value in column k is q · s of the group of k.

    Parameters
    ----------
    codes : torch.Tensor of int8, shape (rows, inner)
        From −2^(bits−1) to 2^(bits−1) − 1.
    scales : torch.Tensor, shape (rows, inner / group), fp32
        Values that bf16 holds, of either sign, not zero.
    bits, group : int
        Of an integer; columns that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    def matrix(self) -> torch.Tensor:
        """The values, fp32 (rows, inner)."""
        return self.codes.float() * self.scales.repeat_interleave(self.group, 1)


def round_nearest(matrix: torch.Tensor, bits: int, group: int) -> Rounded:
    """Q = argmin ‖A − Q‖² for scales of each group out of eight, every value to the nearest integer times its scale.

    The scales looked at are 0.65 to 1 times the one, of either sign, that takes the group's value farthest from zero to
    −2^(bits−1), where the grid reaches farthest. In groups of Gaussian values the few beyond its ends cost less than
    wider steps do for all.

    Parameters
    ----------
    matrix : torch.Tensor, shape (rows, inner), fp32
    bits : int
        From 2 to 8.
    group : int
        Divides `inner`.

    Raises
    ------
    GlobeError
        If the matrix has NaN or Inf, or `group` does not divide its columns.
    """
    _check(matrix, group)
    columns = matrix.float().T.contiguous().unflatten(0, (-1, group))
    scales = torch.stack([_scales(part, torch.ones_like(part[:, 0]), bits) for part in columns])
    codes = _codes(columns, scales[:, None], bits).to(torch.int8)
    return Rounded(codes.flatten(0, 1).T.contiguous(), scales.T.contiguous(), bits, group)


def round_with_feedback(matrix: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> Rounded:
    """Rounding Q of a matrix A for a small tr((A − Q) H (A − Q)ᵀ): GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    Columns are rounded one after another, and what each loses is made up for by those that follow. With H = V Vᵀ, V
    upper triangular, and U = V⁻¹, an error e of column k moves those behind it by −e U[k, k+1:] / U[k, k], and costs
    V[k, k]² e² in the end. So the scales of a group, out of those of `round_nearest`, are chosen when its turn comes,
    by errors weighed with V[k, k]². 10⁻⁴ of the mean diagonal of H is added to its diagonal. Weights of the rows would
    change nothing, as each is rounded by itself.

    Parameters
    ----------
    matrix : torch.Tensor, shape (rows, inner), fp32
    hessian : torch.Tensor, shape (inner, inner)
        Symmetric and positive semidefinite.
    bits, group : int
        As for `round_nearest`.

    Raises
    ------
    GlobeError
        As `round_nearest`, or if the Hessian has NaN or Inf.
    """
    _check(matrix, group)
    feedback = Feedback.of(hessian)
    return round_nearest(matrix, bits, group) if feedback is None else _fed_back(matrix, feedback, bits, group)


def round_atoms(bank: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bits: int, group: int) -> Rounded:
    """Rounding Q_j of atoms B_j for a small Σ_j tr(S_j E_j K E_jᵀ), E_j = B_j − Q_j: feedback along rows and columns.

    The Hessian S_j ⊗ K has the factors of S_j and of K, so errors are made up for in both directions (two-sided
    feedback: YAQA, Tseng et al. 2025, arXiv 2505.22988). 32 rows of all atoms at a time are rounded column after
    column in K; then the rows behind them move to the best that S_j leaves them.

    Parameters
    ----------
    bank : torch.Tensor, shape (m, r, d), fp32
    rows : torch.Tensor, shape (m, r, r), fp32
        S_j; is overwritten.
    columns : torch.Tensor, shape (d, d)
        K.
    bits, group : int
        As for `round_nearest`; `group` divides d.

    Returns
    -------
    Rounded
        Of the rows of all atoms (m r, d).

    Raises
    ------
    GlobeError
        As `round_with_feedback`.
    """
    _check(bank.flatten(0, 1), group)
    feedback = Feedback.of(columns)
    if feedback is None:
        return round_nearest(bank.flatten(0, 1), bits, group)
    for atom in rows:
        found = Feedback.of(atom)
        atom.copy_(torch.eye(len(atom), device=atom.device) if found is None else found.factor)
    moved = bank.float().clone()
    codes = torch.empty(moved.shape, dtype=torch.int8, device=moved.device)
    scales = torch.empty(*moved.shape[:2], moved.shape[2] // group, device=moved.device)
    for first in range(0, moved.shape[1], _ROWS):
        some, rest = slice(first, first + _ROWS), slice(first + _ROWS, None)
        part, factor = moved[:, some], rows[:, some]
        rounded = _fed_back(part.flatten(0, 1), feedback, bits, group)
        codes[:, some] = rounded.codes.view_as(part)
        scales[:, some] = rounded.scales.view(*part.shape[:2], scales.shape[2])
        errors = part - rounded.matrix().view_as(part)
        alone = torch.linalg.solve_triangular(factor[:, :, some].mT, errors, upper=False, unitriangular=True)
        moved[:, rest] -= matmul(factor[:, :, rest].mT, alone)
    return Rounded(codes.flatten(0, 1), scales.flatten(0, 1), bits, group)


def _fed_back(matrix: torch.Tensor, feedback: Feedback, bits: int, group: int) -> Rounded:
    moved = matrix.float().T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(moved, dtype=torch.int8)
    scales = torch.empty(len(moved) // group, moved.shape[1], device=moved.device)
    for place, first in enumerate(range(0, len(moved), group)):
        some, rest = slice(first, first + group), slice(first + group, None)
        part, factor = moved[some], feedback.factor[some, some]
        scale = _scales(part, feedback.weights[some], bits)
        errors = torch.empty_like(part)
        for k, column in enumerate(part):
            code = _codes(column, scale, bits)
            torch.addcmul(column, code, scale, value=-1, out=errors[k])
            part[k + 1 :].addr_(factor[k, k + 1 :], errors[k], alpha=-1)
            codes[first + k] = code
        scales[place] = scale
        moved[rest] -= matmul(feedback.factor[some, rest].T, errors)
    return Rounded(codes.T.contiguous(), scales.T.contiguous(), bits, group)


@dataclass(frozen=True)
class Feedback:
    """How an error moves the columns behind it, and what it costs.

    Parameters
    ----------
    factor : torch.Tensor, shape (inner, inner), fp32
        U[k, l] / U[k, k], of unit diagonal, U the inverse of the upper triangular V with V Vᵀ = H.
    weights : torch.Tensor, shape (inner,), fp32
        V[k, k]².
    """

    factor: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def of(hessian: torch.Tensor) -> Feedback | None:
        """That of a Hessian, whose scale is taken off; None where it is zero.

        Raises
        ------
        GlobeError
            If it has NaN or Inf.
        """
        wide = hessian.to(wide_dtype(hessian.device))
        if not bool(wide.isfinite().all()):
            raise GlobeError("the Hessian of a factor to be rounded holds NaN or Inf; expected finite numbers")
        mean = float(wide.diagonal().mean())
        if mean <= 0:
            return None
        upper = ridged_factor((wide / mean).flip(0, 1), _DAMPING).flip(0, 1)
        unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        inverse = torch.linalg.solve_triangular(upper / upper.diagonal(), unit, upper=True, unitriangular=True)
        return Feedback(inverse.float(), upper.diagonal().square().float())


def above_least(scales: torch.Tensor) -> torch.Tensor:
    """Scales, those nearer to zero than bf16 holds with all its bits put there, with their sign."""
    return torch.where(scales.abs() < _LEAST_SCALE, torch.full_like(scales, _LEAST_SCALE).copysign(scales), scales)


def _check(matrix: torch.Tensor, group: int) -> None:
    if not bool(matrix.isfinite().all()):
        raise GlobeError("a factor to be rounded holds NaN or Inf; expected finite numbers")
    if matrix.shape[1] % group:
        raise GlobeError(f"a factor has {matrix.shape[1]} columns; expected groups of {group} to divide them")


def _scales(values: torch.Tensor, weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales (n,) of groups (group, n), as bf16 holds them, by errors that `weights` (group,) weigh."""
    farthest = values.gather(0, values.abs().argmax(0, keepdim=True))[0] / -(2 ** (bits - 1))
    best, least = torch.ones_like(farthest), torch.full_like(farthest, torch.inf)
    for share in _SHARES if bits < _FINE else _SHARES[-1:]:
        scale = above_least((share * farthest).bfloat16().float())
        error = (
            torch.addcmul(values, _codes(values, scale, bits), scale, value=-1).square_().mul_(weights[:, None]).sum(0)
        )
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _codes(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest integers of the grid, as floats."""
    top = 2 ** (bits - 1)
    return (values / scales).round_().clamp_(-top, top - 1)
