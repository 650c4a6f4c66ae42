"""Floating-point operations of the joint fit, from shapes alone."""

from __future__ import annotations

SKETCHED = 16  # random columns of the codes' curvature


def keeps_columns(weighed: bool, rank: int, width: int) -> bool:
    """Whether the joint fit keeps K_i (d × d) of every expert, and not a basis of its rows (r × d)."""
    return weighed and width <= 2 * rank


def pass_flops(p: int, d: int, r: int, m: int, weighed: bool) -> int:
    """Of one expert in a pass: f, its gradient, and what its curvature needs.

    Products alone, 2 k l n for k × l times l × n, as many as the form of CUDA and MPS computes: mixtures and sums over
    experts with all m codes, of which a CPU takes those that are not zero. Not counted: Cholesky factors (r³/3) and
    the triangular solves for a basis of the rows (r² d + r³), in fp64; W'_i, made once (:func:`weighing_flops`); what
    a sampled expert adds where not all are (:func:`sample_flops`); L_l L_lᵀ (:func:`moment_flops`); sums of what a
    product does not make.

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
    basis = 2 * r * r * d
    lefts = 2 * (2 * p * r * d) + 2 * r * r * p + 2 * (2 * r * r * d) + 2 * (2 * r**3)
    sketch = 2 * (2 * r * d * SKETCHED) + 2 * m * SKETCHED * (r * d + r * r + m * r)
    sums = 2 * mixture + 2 * m * r * r
    through = 2 * (2 * r * d * d) + 2 * SKETCHED * d * d if weighed else 0
    kept = sample_flops(d, r, weighed) if keeps_columns(weighed, r, d) else 0
    return mixture + basis + lefts + sketch + sums + through + kept


def sample_flops(d: int, r: int, weighed: bool) -> int:
    """What an expert adds to a pass that speaks for others too: its mixture's Gram and, in a metric, K_i.

    Parameters
    ----------
    d, r, weighed
        As in :func:`pass_flops`, which has it where K_i is kept of every expert.
    """
    return 2 * r * r * d + (2 * r * d * d + 2 * r * d * d if weighed else 0)


def moment_flops(d: int) -> int:
    """L_l L_lᵀ: on a device once for all experts of a layer in hand, on a CPU for every K_i that is made."""
    return 2 * d**3


def weighing_flops(p: int, d: int, mixes_rows: bool) -> int:
    """W'_i = D_i W_i L_i of one expert, once a fit; `mixes_rows` where D_i is not diagonal."""
    return 2 * p * d * d + (2 * p * p * d if mixes_rows else 0)


def iteration_flops(d: int, r: int, m: int, weighed: bool) -> int:
    """Of one expert in one product with the Gauss-Newton matrix, which is a step of conjugate gradients.

    Counted as in :func:`pass_flops`, nothing being left out. W is not read: p does not matter.

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
    """Of the whole bank in one step of conjugate gradients, whatever the number of experts."""
    each = 2 * (2 * r * r * d) + (2 * r * d * d if weighed else 0)
    return m * each + 2 * m * m * r * d
