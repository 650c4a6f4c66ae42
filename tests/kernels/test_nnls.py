import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.kernels import NnlsStatus, nnls

properties = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data(m, k, n, seed=0):
    """Atoms and targets of k entries, with their Gram matrix and correlations."""
    rng = np.random.default_rng(seed)
    atoms, targets = rng.standard_normal((m, k)) + 0.5, rng.standard_normal((n, k)) + 0.3
    return atoms, targets, atoms @ atoms.T, targets @ atoms.T


def violation(g, c, x, *, l1=0.0, simplex=False):
    """Largest violation of the optimality conditions of each row, as NnlsResult.kkt_residual defines it."""
    w = c - l1 - x @ g
    if simplex:
        w -= (w * x).sum(axis=1, keepdims=True)
    scale = np.abs(c - l1).max(axis=1) + g.diagonal().max() * x.sum(axis=1)
    worst = np.where(x > 0, np.abs(w), np.maximum(w, 0)).max(axis=1)
    return np.divide(worst, scale, out=np.zeros_like(scale), where=scale > 0)


def objective(g, c, x):
    return 0.5 * np.einsum("ni,ij,nj->n", x, g, x) - (c * x).sum(axis=1)


def assert_optimal(result, g, c, **problem):
    assert (result.status == NnlsStatus.OPTIMAL).all()
    assert (result.codes >= 0).all()
    assert (result.kkt_residual <= 1e-10).all()
    assert (violation(g, c, result.codes, **problem) <= 1e-10).all()
    if problem.get("simplex"):
        np.testing.assert_allclose(result.codes.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize(("m", "k"), [(1, 5), (5, 8), (30, 40), (64, 64), (131, 150)])
def test_matches_scipy(backend, m, k):
    atoms, targets, g, c = data(m, k, 20)
    result = nnls(g, c, backend=backend)
    assert_optimal(result, g, c)
    expected = np.array([scipy.optimize.nnls(atoms.T, t)[0] for t in targets])
    np.testing.assert_allclose(result.codes, expected, atol=1e-7 * max(1, np.abs(expected).max()))
    assert result.codes.shape == (20, m) and result.status.dtype == np.int8 and result.iterations.dtype == np.int64


def test_simplex_matches_slsqp(backend):
    _, _, g, c = data(6, 9, 8)
    result = nnls(g, c, simplex=True, backend=backend)
    assert_optimal(result, g, c, simplex=True)
    for row, codes in zip(c, result.codes, strict=True):
        expected = scipy.optimize.minimize(
            lambda x, row=row: 0.5 * x @ g @ x - row @ x,
            np.full(6, 1 / 6),
            jac=lambda x, row=row: g @ x - row,
            bounds=[(0, 1)] * 6,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15},
        )
        np.testing.assert_allclose(codes, expected.x, atol=1e-5)


@pytest.mark.parametrize("simplex", [False, True])
def test_a_thousand_atoms(backend, simplex):
    _, _, g, c = data(1024, 1100, 2)
    cold = nnls(g, c, simplex=simplex, backend=backend)
    assert_optimal(cold, g, c, simplex=simplex)
    guess = cold.codes > 0
    guess[:, ::50] ^= True
    warm = nnls(g, c, simplex=simplex, warm_start=guess, backend=backend)
    assert_optimal(warm, g, c, simplex=simplex)
    np.testing.assert_allclose(warm.codes, cold.codes, atol=1e-9 * cold.codes.max())


def test_l1_is_a_shift(backend):
    _, _, g, c = data(12, 20, 10)
    penalised = nnls(g, c, l1=2.0, backend=backend)
    assert_optimal(penalised, g, c, l1=2.0)
    np.testing.assert_allclose(penalised.codes, nnls(g, c - 2.0, backend=backend).codes)
    assert not nnls(g, c, l1=1e6, backend=backend).codes.any()


def test_backends_agree(backend):
    _, _, g, c = data(40, 50, 30)
    for simplex in (False, True):
        expected = nnls(g, c, simplex=simplex, backend="reference")
        result = nnls(g, c, simplex=simplex, backend=backend)
        np.testing.assert_allclose(result.codes, expected.codes, rtol=0, atol=1e-11)
        assert np.array_equal(result.iterations, expected.iterations)


@properties
@given(m=st.integers(1, 40), n=st.integers(0, 40), threads=st.integers(2, 5), simplex=st.booleans())
def test_neither_threads_nor_other_rows_change_a_bit(backend, m, n, threads, simplex):
    _, _, g, c = data(m, m + 3, n, seed=n)
    c *= np.logspace(-8, 8, n)[:, None]
    one = nnls(g, c, simplex=simplex, backend=backend, threads=1)
    several = nnls(g, c, simplex=simplex, backend=backend, threads=threads)
    backwards = nnls(g, c[::-1], simplex=simplex, backend=backend)
    for name in ("codes", "status", "iterations", "kkt_residual"):
        expected = getattr(one, name).tobytes()
        assert getattr(several, name).tobytes() == getattr(backwards, name)[::-1].tobytes() == expected


@properties
@given(m=st.integers(1, 30), seed=st.integers(0, 999), share=st.floats(0, 1), simplex=st.booleans())
def test_a_warm_start_ends_at_the_same_solution(backend, m, seed, share, simplex):
    _, _, g, c = data(m, m + 5, 6, seed)
    cold = nnls(g, c, simplex=simplex, backend=backend)
    guess = np.random.default_rng(seed).random(c.shape) < share
    warm = nnls(g, c, simplex=simplex, warm_start=guess, backend=backend)
    assert_optimal(warm, g, c, simplex=simplex)
    np.testing.assert_allclose(warm.codes, cold.codes, rtol=0, atol=1e-10 * max(1.0, cold.codes.max()))


@pytest.mark.parametrize("simplex", [False, True])
def test_a_right_guess_needs_one_system(backend, simplex):
    _, _, g, c = data(50, 60, 20)
    guess = nnls(g, c, simplex=simplex).codes > 0
    assert (nnls(g, c, simplex=simplex, warm_start=guess, backend=backend).iterations == 1).all()


@pytest.mark.parametrize("simplex", [False, True])
def test_a_bounded_support_is_optimal_on_its_own_atoms(backend, simplex):
    _, _, g, c = data(30, 45, 12)
    before = np.full(12, np.inf)
    for bound in range(1, 12):
        result = nnls(g, c, simplex=simplex, max_support=bound, backend=backend)
        sizes = (result.codes > 0).sum(axis=1)
        assert (sizes <= bound).all()
        full = result.status == NnlsStatus.SUPPORT_LIMIT
        assert (sizes[full] == bound).all() and (result.status[~full] == NnlsStatus.OPTIMAL).all()
        assert (result.kkt_residual <= 1e-10).all()
        for row, codes in zip(c, result.codes, strict=True):
            used = np.flatnonzero(codes)
            if len(used):
                again = nnls(g[np.ix_(used, used)], row[None, used], simplex=simplex)
                np.testing.assert_allclose(codes[used], again.codes[0], atol=1e-10)
        after = objective(g, c, result.codes)
        assert (after <= before).all()
        before = after


def test_a_bounded_support_takes_the_steepest_atoms(backend):
    g = np.diag([1.0, 4.0, 1.0, 1.0])
    c = np.array([[3.0, 5.0, -9.0, 2.0], [1.0, 2.5, 1.5, 0.0]])
    result = nnls(g, c, max_support=2, backend=backend)
    np.testing.assert_allclose(result.codes, [[3.0, 1.25, 0, 0], [0, 0.625, 1.5, 0]])
    assert result.status.tolist() == [NnlsStatus.SUPPORT_LIMIT, NnlsStatus.SUPPORT_LIMIT]
    assert nnls(g, c, max_support=3, backend=backend).status.tolist() == [NnlsStatus.OPTIMAL, NnlsStatus.OPTIMAL]
    unbounded = nnls(g, c, backend=backend)
    assert np.array_equal(nnls(g, c, max_support=4, backend=backend).codes, unbounded.codes)


def test_fewer_atoms_never_do_better(backend):
    _, _, g, c = data(20, 30, 10)
    all_of_them = objective(g, c, nnls(g, c, backend=backend).codes)
    some = objective(g[:10, :10], c[:, :10], nnls(g[:10, :10], c[:, :10], backend=backend).codes)
    assert (all_of_them <= some + 1e-9).all()


def test_limit_is_reported(backend):
    _, _, g, c = data(20, 30, 3)
    for simplex in (False, True):
        result = nnls(g, c, simplex=simplex, max_iterations=1, backend=backend)
        assert (result.iterations <= 1).all() and (result.codes >= 0).all()
        assert (result.status == NnlsStatus.NOT_CONVERGED).any()
        assert ((result.kkt_residual > 1e-10) == (result.status == NnlsStatus.NOT_CONVERGED)).all()


def test_takes_any_numbers(backend):
    g = [[2, 1], [1, 2]]
    expected = nnls(np.array(g, float), np.array([[3.0, 3.0]]), backend=backend).codes
    np.testing.assert_allclose(expected, [[1, 1]])
    for dtype in (np.int32, np.float16, np.float32):
        strided = np.zeros((4, 4), dtype)[::2, ::2]
        strided[...] = g
        result = nnls(strided, np.full((1, 4), 3, dtype)[:, ::2], backend=backend)
        assert np.array_equal(result.codes, expected)
    assert nnls(np.eye(3), np.zeros((0, 3)), backend=backend).codes.shape == (0, 3)


def test_importing_does_not_import_numba():
    code = "import sys, globe.kernels; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"gram": np.zeros((2, 3))}, "gram"),
        ({"gram": np.array([[1.0, 2.0], [0.0, 1.0]])}, "gram"),
        ({"gram": -np.eye(2)}, "gram"),
        ({"gram": np.full((2, 2), np.nan)}, "gram"),
        ({"gram": np.eye(2) * 1j}, "gram"),
        ({"gram": [["a", "b"], ["c", "d"]]}, "gram"),
        ({"gram": [[1.0], [1.0, 2.0]]}, "gram"),
        ({"correlations": np.zeros(2)}, "correlations"),
        ({"correlations": np.zeros((1, 3))}, "correlations"),
        ({"correlations": np.full((1, 2), np.inf)}, "correlations"),
        ({"correlations": None}, "correlations"),
        ({"l1": -1.0}, "l1"),
        ({"l1": np.nan}, "l1"),
        ({"l1": 1.0, "simplex": True}, "l1"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": np.nan}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"max_iterations": 2.5}, "max_iterations"),
        ({"max_support": 0}, "max_support"),
        ({"max_support": "all"}, "max_support"),
        ({"warm_start": np.zeros((1, 2))}, "warm_start"),
        ({"warm_start": np.zeros((2, 2), bool)}, "warm_start"),
        ({"refine": np.eye(2)}, "refine"),
        ({"refine": (np.zeros((4, 3)), np.zeros((1, 4)))}, "refine"),
        ({"refine": (np.eye(2), np.zeros((2, 2)))}, "refine"),
        ({"refine": (np.eye(2) * np.nan, np.zeros((1, 2)))}, "refine"),
        ({"refine": (np.eye(2) * 2, np.zeros((1, 2)))}, "refine"),
        ({"threads": 0}, "threads"),
        ({"backend": "fortran"}, "backend"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {"gram": np.eye(2), "correlations": np.zeros((1, 2)), **change}
    with pytest.raises(ValueError, match=f"^{name}: found"):
        nnls(arguments.pop("gram"), arguments.pop("correlations"), **arguments)
