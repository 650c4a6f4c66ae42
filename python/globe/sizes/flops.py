"""Floating-point operations of the joint fit, from shapes alone."""

from __future__ import annotations

SKETCHED = 16  # random columns of the codes' curvature
PROBED = 16  # atoms at once, for an expert
SAMPLED = 48  # experts, or a few more, whose columns and rows speak for all


def keeps_columns(weighed: bool, rank: int, width: int) -> bool:
    """Whether the joint fit keeps K_i (d × d) of every expert, and not a basis of its rows (r × d)."""
    return weighed and width <= 4 * rank


def pass_flops(p: int, d: int, r: int, m: int, weighed: bool) -> int:
    """Of one expert in a pass of the joint fit: f, its gradient, and what its curvature needs.

    Products alone, 2 k l n for k × l times l × n, as many as the form of CUDA and MPS computes: a CPU passes over codes
    that are zero, and over 3/8 of a triangular matrix. Those of the Gram matrix and the basis of the rows, 4 r² d, are
    in fp64. Not counted: Cholesky factors and their inverses, 4/3 r³ in fp64; W'_i, made once
    (:func:`weighing_flops`); the curvature of its codes (:func:`codes_flops`); what one of the `SAMPLED` adds
    (:func:`sample_flops`); L_l L_lᵀ, made once where K_i is kept; and what is no product.

    Parameters
    ----------
    p, d : int
        W_i is p × d.
    r, m : int
        Rank and atoms.
    weighed : bool
        Whether there is a metric, which weighs columns.
    """
    mixture = 2 * m * r * d
    basis = 2 * (2 * r * r * d)
    lefts = 2 * (2 * p * r * d) + 2 * r * r * p + 2 * (2 * r * r * d) + 2 * (2 * r**3)
    sketch = 2 * (2 * r * d * SKETCHED)
    sums = 2 * mixture + 2 * m * r * r
    through = 2 * (2 * r * d * d) + 2 * SKETCHED * d * d if weighed else 0
    kept = _columns_flops(d, r) if keeps_columns(weighed, r, d) else 0
    return mixture + basis + lefts + sketch + sums + through + kept


def error_flops(p: int, d: int, r: int, m: int, weighed: bool) -> int:
    """Of one expert in a pass that asks for f alone, counted as in :func:`pass_flops`."""
    return 2 * m * r * d + 2 * (2 * r * r * d) + 2 * p * r * d + (2 * r * d * d if weighed else 0)


def codes_flops(d: int, r: int, atoms: int) -> int:
    """Of the curvature of one expert's codes in a pass, for as many atoms as it has, or all where they are chosen."""
    return 2 * atoms * SKETCHED * (r * d + r * r + atoms * r)


def sample_flops(d: int, r: int, weighed: bool) -> int:
    """What one of the sampled experts adds to a pass: its mixture's Gram matrix, K_i in a metric unless kept, and sums.

    Parameters
    ----------
    d, r, weighed
        As in :func:`pass_flops`.
    """
    columns = weighed and not keeps_columns(weighed, r, d)
    return 2 * r * r * (d + 1) + 2 * d * d + (2 * d**3 + _columns_flops(d, r) if columns else 0)


def _columns_flops(d: int, r: int) -> int:
    """Of K_i, with L_l L_lᵀ at hand."""
    return 2 * (2 * r * d * d)


def weighing_flops(p: int, d: int, mixes_rows: bool) -> int:
    """W'_i = D_i W_i L_i of one expert, once a fit; `mixes_rows` where D_i is not diagonal."""
    return 2 * p * d * d + (2 * p * p * d if mixes_rows else 0)


def iteration_flops(d: int, r: int, m: int, weighed: bool) -> int:
    """Of one expert in a product with the Gauss-Newton matrix, of which a step of conjugate gradients takes one.

    Counted as in :func:`pass_flops`, with nothing left out but what is no product. W is not read: p does not matter.

    Parameters
    ----------
    d, r, m, weighed
        As there.
    """
    mixtures_and_sums = 4 * (2 * m * r * d)
    lefts = 2 * r * r * d
    if keeps_columns(weighed, r, d):
        return mixtures_and_sums + lefts + 2 * r * d * d
    through = 2 * (2 * r * d * d) if weighed else 0
    return mixtures_and_sums + lefts + 2 * lefts + through


def preconditioner_flops(d: int, r: int, m: int, weighed: bool) -> int:
    """Of the whole bank in a step of conjugate gradients, whatever the number of experts."""
    each = 2 * (2 * r * r * d) + (2 * r * d * d if weighed else 0)
    return m * each + 2 * m * m * r * d


def own_pass_flops(d: int, r: int, own: int) -> int:
    """What `own` directions of an expert add to a pass; as in :func:`pass_flops`, of one for which K_i is kept too."""
    through = 2 * _own_flops(r, d, own) + _own_flops(SKETCHED, d, own)
    return through + (own_sample_flops(d, r, own) if keeps_columns(True, r, d) else 0)


def own_error_flops(d: int, r: int, own: int) -> int:
    """What they add to a pass that asks for f alone."""
    return _own_flops(r, d, own)


def own_sample_flops(d: int, r: int, own: int) -> int:
    """What they add to K_i: to its rows, and L U_i Λ_i U_iᵀ Lᵀ."""
    return _own_flops(r, d, own) + 2 * (2 * d * d * own)


def own_iteration_flops(d: int, r: int, own: int) -> int:
    """What they add to a product with the Gauss-Newton matrix: nothing where K_i is kept."""
    return 0 if keeps_columns(True, r, d) else 2 * _own_flops(r, d, own)


def _own_flops(rows: int, d: int, own: int) -> int:
    """Of X R_i for X (rows, d); where X is W_i, too."""
    return 2 * (2 * rows * d * own)
