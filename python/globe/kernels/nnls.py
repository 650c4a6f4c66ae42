"""Non-negative least squares from a Gram matrix.

Blocks of atoms are exchanged while that makes progress, in the manner of block principal pivoting (Kim and
Park, "Fast nonnegative matrix factorization: an active-set-like method and comparisons", SIAM J. Sci. Comput.
33, 2011). Where it stops, an active-set method finishes, which cannot cycle because every step lowers the
objective (Lawson and Hanson, "Solving least squares problems", 1974; Gram form after Bro and de Jong, "A fast
non-negativity-constrained least squares algorithm", J. Chemometrics 11, 1997). Two things differ from the
papers: blocks at most double the support, and atoms that depend on those in use change places with one of
them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globe import _native
from globe.kernels.arguments import number, plain, whole
from globe.kernels.backends import check_threads, choose

Floats = NDArray[np.float64]


class NnlsStatus(IntEnum):
    """How the solution of one right-hand side came out."""

    OPTIMAL = 0
    """The optimality conditions hold to the tolerance."""
    SINGULAR = 1
    """The Gram matrix is singular and the objective has no minimum: an atom was set aside, the rest is optimal."""
    NOT_CONVERGED = 2
    """The iteration limit was reached, or rounding kept the conditions above the tolerance."""
    SUPPORT_LIMIT = 3
    """``max_support`` kept an atom out: the codes are optimal on their own support."""
    INDEFINITE = 4
    """Negative curvature was met, so G is no Gram matrix: the codes may be a saddle point or one of several minima."""
    OVERFLOW = 5
    """A code is beyond the range of float64 and stands as its largest number, or, on the simplex, the correlations are
    too large beside G."""


@dataclass(frozen=True)
class NnlsResult:
    """Solutions of :func:`nnls`, one row per right-hand side."""

    codes: Floats
    """Solutions α, shape (n, m)."""
    status: NDArray[np.int8]
    """:class:`NnlsStatus` of each row, shape (n,)."""
    iterations: NDArray[np.int64]
    """Linear systems solved for each row, shape (n,)."""
    kkt_residual: Floats
    """Largest violation of the optimality conditions relative to ``max |c − l1| + max(diag G) Σα``, shape (n,).

    Over the atoms that the status speaks of: all but those set aside, or those of the support alone."""
    scaled_residual: Floats
    """The largest over the same atoms, each relative to its own terms ``|c_j − l1| + ‖a_j‖ y``, shape (n,).

    With ‖a_j‖ = √G_jj and y = Σ_k ‖a_k‖ α_k. It does not change with the scale of any atom. On the simplex the terms
    are ``|c_j − c_v| + Σ_k |c_k − c_v| α_k + (‖a_j‖ + y) y``, v being the atom that is best alone. With ``refine``
    they are ``‖a_j‖ (‖b‖ + y) + l1``, on the simplex ``(‖a_j‖ + y) (‖b‖ + y)``, and the status goes by this
    measure alone."""


@dataclass(frozen=True)
class NnlsProblem:
    """What the implementations are given: checked arguments, arrays in C order; 0 for no bound on the support."""

    gram: Floats
    correlations: Floats
    l1: float
    simplex: bool
    tolerance: float
    max_iterations: int
    max_support: int
    warm_start: NDArray[np.bool_] | None


def nnls(
    gram: ArrayLike,
    correlations: ArrayLike,
    *,
    l1: float = 0.0,
    simplex: bool = False,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    max_support: int | None = None,
    warm_start: ArrayLike | None = None,
    refine: tuple[ArrayLike, ArrayLike] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> NnlsResult:
    """Solve ``argmin_{α ≥ 0} ½ αᵀGα − cᵀα + l1 Σα`` for every row c of the correlations.

    With ``simplex`` the entries of α must also sum to 1. For a dictionary D with one atom per row and
    a target t, ``G = D Dᵀ`` and ``c = D t``. Each row is solved on its own in float64; its result depends
    neither on the other rows nor on the number of threads, and not on the scale of the atoms: each is brought to the
    size of the largest by a power of two, 2^1000 at most. m = 0 has empty codes.

    Parameters
    ----------
    gram : array_like, shape (m, m)
        G, symmetric and positive semidefinite. Never regularised: see :class:`NnlsStatus`.
    correlations : array_like, shape (n, m)
        One right-hand side per row.
    l1 : float
        Penalty on the sum of the codes, 0 or more; must be 0 with ``simplex``.
    simplex : bool
        Require ``Σα = 1``.
    tolerance : float
        Bound on ``kkt_residual`` and ``scaled_residual``; half of it on the gradient at which an atom enters,
        relative to the atom's own terms as ``scaled_residual`` is.
    max_iterations : int, optional
        Linear systems per right-hand side; ``10 m + 30`` by default.
    max_support : int, optional
        Most non-zeros of a row. The best choice of atoms is a combinatorial problem; this is the greedy one,
        orthogonal matching pursuit with signs: starting from no atom (with ``simplex`` from the best single
        one), the atom of the largest gradient relative to its norm enters, the codes move to the minimum over
        the atoms in use, atoms whose codes fall to zero on the way leave, until no atom would enter (the row
        is then solved, status as without a bound) or the support is full (``SUPPORT_LIMIT``). A row whose
        unbounded solution would fit may still end with ``SUPPORT_LIMIT``.
    warm_start : array_like of bool, shape (n, m), optional
        Supports to start from, for instance ``result.codes > 0`` of a similar problem. The solution is the
        same; good guesses spare most of the time. Not used with ``max_support``.
    refine : (A, b), optional
        The matrix itself, shape (k, m), one atom per column, and the targets, shape (n, k) or, of one row, (k,), with
        ``G = AᵀA`` and ``c = Aᵀb``: G has only half of their digits. Every row is then carried on from its solution by
        residuals and corrections computed from A (QR), its support examined again. The result has the residuals of
        A; with it atoms enter whenever their gradient exceeds its rounding.
    backend : {"auto", "native", "numba", "reference"}
        Implementation; see :func:`globe.kernels.available`.
    threads : int, optional
        Threads to use; as set by :func:`set_num_threads` by default.

    Returns
    -------
    NnlsResult
        Codes, status, iterations and residual of every row.

    Raises
    ------
    ValueError
        If an argument has a wrong shape or value, with the argument named.

    Examples
    --------
    The best non-negative mixture of two atoms for two targets; the second would take a negative code:

    >>> import numpy as np
    >>> from globe.kernels import nnls
    >>> atoms = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    >>> targets = np.array([[3.0, 2.0, 0.0], [2.0, -1.0, 0.0]])
    >>> result = nnls(atoms @ atoms.T, targets @ atoms.T)
    >>> result.codes
    array([[1., 2.],
           [2., 0.]])
    >>> result.status
    array([0, 0], dtype=int8)
    """
    matrix, targets = _validate(gram, correlations)
    n, m = targets.shape
    l1, tolerance = number("l1", l1), number("tolerance", tolerance)
    _check_options(l1, simplex, tolerance)
    bound = _count("max_support", max_support, m)
    problem = NnlsProblem(
        matrix,
        targets,
        float(l1),
        bool(simplex),
        float(tolerance),
        _count("max_iterations", max_iterations, 10 * m + 30),
        bound if bound < m else 0,
        None if warm_start is None else _supports(warm_start, targets.shape),
    )
    original = None if refine is None else _matrix(refine, matrix, n)
    count = check_threads(threads)
    chosen = choose(backend)
    result = NnlsResult(np.zeros((n, m)), np.zeros(n, np.int8), np.zeros(n, np.int64), np.zeros(n), np.zeros(n))
    if m == 0:
        return result
    if chosen == "native":
        _native.nnls(
            problem.gram,
            problem.correlations,
            problem.l1,
            problem.simplex,
            problem.tolerance,
            problem.max_iterations,
            problem.max_support,
            problem.warm_start,
            result.codes,
            result.status,
            result.iterations,
            result.kkt_residual,
            result.scaled_residual,
            count,
        )
    else:
        importlib.import_module(f"globe.kernels.{chosen}.nnls").solve(problem, result, count)
    if original is not None:
        importlib.import_module("globe.kernels.nnls_refine").refine(problem, *original, result)
    return result


def _validate(gram: ArrayLike, correlations: ArrayLike) -> tuple[Floats, Floats]:
    matrix, targets = _floats("gram", gram), _floats("correlations", correlations)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"gram: found shape {matrix.shape}; expected (m, m)")
    m = matrix.shape[0]
    if targets.ndim != 2 or targets.shape[1] != m:
        raise ValueError(
            f"correlations: found shape {targets.shape}; expected (n, {m}); pass one right-hand side per row"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("gram: found NaN or infinity; expected finite entries; check the vectors it was made from")
    if not np.isfinite(targets).all():
        raise ValueError("correlations: found NaN or infinity; expected finite entries; check the targets")
    if (matrix.diagonal() < 0.0).any():
        raise ValueError("gram: found a negative diagonal entry; expected a positive semidefinite matrix")
    if not _is_symmetric(matrix):
        asymmetry = float(np.abs(matrix - matrix.T).max())
        if asymmetry > 1e-6 * float(np.abs(matrix).max()):
            raise ValueError(
                f"gram: found an asymmetry of {asymmetry:.3g}; expected a symmetric matrix; use (G + Gᵀ)/2"
            )
        matrix = np.ascontiguousarray(0.5 * matrix + 0.5 * matrix.T)
    return matrix, targets


def _matrix(refine: tuple[ArrayLike, ArrayLike], gram: Floats, n: int) -> tuple[Floats, Floats]:
    if not isinstance(refine, tuple) or len(refine) != 2:
        raise ValueError(f"refine: found {type(refine).__name__}; expected a pair (A, b)")
    matrix, targets = _floats("refine", refine[0]), _floats("refine", refine[1])
    if targets.ndim == 1 and n == 1:
        targets = targets[None]
    if matrix.ndim != 2 or matrix.shape[1] != len(gram):
        raise ValueError(f"refine: found A of shape {matrix.shape}; expected (k, {len(gram)}), one atom per column")
    if targets.shape != (n, len(matrix)):
        raise ValueError(f"refine: found b of shape {targets.shape}; expected ({n}, {len(matrix)}), one target per row")
    if not (np.isfinite(matrix).all() and np.isfinite(targets).all()):
        raise ValueError("refine: found NaN or infinity; expected finite entries")
    with np.errstate(over="ignore", under="ignore"):
        apart = np.abs(np.square(matrix).sum(axis=0) - gram.diagonal())
    if (apart > 1e-3 * gram.diagonal() + 1e-300).any():
        raise ValueError("refine: found columns of A whose squared norms are not the diagonal of gram; pass G = AᵀA")
    return matrix, targets


def _is_symmetric(matrix: Floats) -> bool:
    step = 64  # blocks that stay in cache while they are transposed
    starts = range(0, len(matrix), step)
    return all(np.array_equal(matrix[i : i + step, : i + step], matrix[: i + step, i : i + step].T) for i in starts)


def _floats(argument: str, numbers: ArrayLike) -> Floats:
    return np.ascontiguousarray(plain(argument, numbers), dtype=np.float64)


def _count(argument: str, value: int | None, default: int) -> int:
    return default if value is None else whole(argument, value, 2**63 - 1, ", or None")


def _check_options(l1: float, simplex: bool, tolerance: float) -> None:
    if not 0.0 <= l1 < np.inf:
        raise ValueError(f"l1: found {l1}; expected a finite number of at least 0")
    if simplex and l1 > 0.0:
        raise ValueError(f"l1: found {l1} with simplex=True; expected 0, because the sum is fixed; drop one of the two")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance: found {tolerance}; expected a number between 0 and 1; 1e-10 is a good choice")


def _supports(warm_start: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    supports = plain("warm_start", warm_start)
    if supports.dtype != np.bool_:
        raise ValueError(f"warm_start: found {supports.dtype}; expected bool; pass codes > 0")
    if supports.shape != shape:
        raise ValueError(f"warm_start: found shape {supports.shape}; expected {shape}, as the correlations'")
    return np.ascontiguousarray(supports)
