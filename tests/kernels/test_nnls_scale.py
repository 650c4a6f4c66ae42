"""Non-negative least squares that does not depend on the scale of its variables, and 129 hard cases."""

import numpy as np
import pytest
import scipy.optimize

from globe.kernels import NnlsStatus, nnls


def hard_cases():
    """Yield 129 pairs (A, b), all deterministic; in most the columns' norms are far apart."""
    for number in range(12):  # orthogonal atoms, norms down to 10^-number
        yield np.diag(np.logspace(0, -number, 7)), np.logspace(0, -number, 7)
    for power in range(13):  # two short atoms and a long one that must not enter
        yield inverse_case(10.0**-power)
    for number in range(10):  # norms that differ by 3e-6
        angle = 0.15 * (number + 1)
        a = np.array([[1.0, 3e-6 * np.cos(angle)], [0.0, 3e-6 * np.sin(angle)], [0.0, 0.0]])
        yield a, a @ [1.0, 2.0] + [0.0, 0.0, 1.0]
    for n in range(3, 9):  # Hilbert, Vandermonde
        yield 1.0 / (np.arange(n)[:, None] + np.arange(n) + 1), np.cos(np.arange(n))
        yield np.vander(np.linspace(0.0, 1.0, n + 2), n), np.sin(np.arange(n + 2) + 0.5)
    for seed in range(10):  # duplicates of another norm
        a = np.random.default_rng(seed).standard_normal((8, 5))
        yield np.hstack([a, a[:, :3] * 10.0 ** -(seed % 5)]), np.random.default_rng(seed + 100).standard_normal(8)
    for power in range(3, 9):  # near-duplicates
        rng = np.random.default_rng(power)
        a = rng.standard_normal((9, 4))
        yield np.hstack([a, a + 10.0**-power * rng.standard_normal((9, 4))]), rng.standard_normal(9)
    for seed in range(30):  # norms that differ by 1e5
        rng = np.random.default_rng(1000 + seed)
        m = 3 + seed % 10
        yield rng.standard_normal((m + 4, m)) * 10.0 ** rng.uniform(-2.5, 2.5, m), rng.standard_normal(m + 4)
    for power in (-150, -120, -77, -30, -8, 8, 30, 77, 120, 150):  # everything far from one
        rng = np.random.default_rng(power + 500)
        yield rng.standard_normal((9, 6)) * 10.0**power, rng.standard_normal(9)
    for seed in range(26):  # degenerate vertices: gradients that are zero outside of the support
        rng = np.random.default_rng(2000 + seed)
        a = rng.integers(-2, 3, (6, 5)).astype(float)
        x, away = rng.integers(0, 2, 5).astype(float), rng.integers(-2, 3, 6).astype(float)
        yield a * 2.0 ** -(np.arange(5) * (seed % 4)), a @ x + (away - a @ np.linalg.lstsq(a, away, rcond=None)[0])


def inverse_case(s):
    return np.array([[s, -0.8 * s, 0.0], [0.0, 0.6 * s, -1.0]]), np.array([1.0, 0.5])


def energy(a, b, x):
    """‖A x − b‖² / ‖b‖² in extended precision."""
    rest = a.astype(np.longdouble) @ x - b
    return float(rest @ rest / (b.astype(np.longdouble) @ b))


@pytest.mark.parametrize(("refined", "tolerance"), [(False, 1e-9), (True, 1e-13)])
def test_all_hard_cases(backend, refined, tolerance):
    cases = list(hard_cases())
    assert len(cases) == 129
    wrong = []
    for number, (a, b) in enumerate(cases):
        result = nnls(a.T @ a, (b @ a)[None], refine=(a, b) if refined else None, backend=backend)
        sizes = np.linalg.norm(a / np.abs(a).max(), axis=0) * np.abs(a).max()
        expected = scipy.optimize.nnls(a / sizes, b)[0] / sizes  # SciPy's, on the matrix itself, all norms one
        solved = result.status[0] == NnlsStatus.OPTIMAL and result.scaled_residual[0] <= 1e-10
        if not (solved and energy(a, b, result.codes[0]) <= energy(a, b, expected) + tolerance):
            wrong.append(number)
    assert wrong == []


def test_a_graded_diagonal(backend):
    diagonal = 10.0 ** -np.arange(11)
    result = nnls(np.diag(diagonal), diagonal[None], backend=backend)
    np.testing.assert_allclose(result.codes, np.ones((1, 11)), rtol=1e-14)
    assert result.status[0] == NnlsStatus.OPTIMAL


@pytest.mark.parametrize("power", [0, 3, 5, 8, 12])
@pytest.mark.parametrize("refined", [False, True])
def test_inverse(backend, power, refined):
    s = 10.0**-power
    a, b = inverse_case(s)
    for simplex, bound in ((False, None), (False, 2), (True, None), (True, 2)):
        target = 0.4 * s * b if simplex else b  # with the sum 1: (2/3, 1/3, 0)
        settings = {"simplex": simplex, "max_support": bound, "refine": (a, target) if refined else None}
        result = nnls(a.T @ a, (target @ a)[None], backend=backend, **settings)
        expected = np.array([5 / 3, 5 / 6, 0.0]) * (0.4 if simplex else 1 / s)
        np.testing.assert_allclose(result.codes[0], expected, rtol=1e-12, atol=1e-12 * expected.max())
        assert result.status[0] == NnlsStatus.OPTIMAL


@pytest.mark.parametrize("simplex", [False, True])
def test_powers_of_two_change_no_bit(backend, simplex):
    rng = np.random.default_rng(3)
    atoms, targets = rng.standard_normal((12, 20)), rng.standard_normal((5, 20))
    factors = np.ones(12) if simplex else 2.0 ** rng.integers(-20, 21, 12)
    first, second = (
        nnls(d @ d.T, targets @ d.T, simplex=simplex, backend=backend) for d in (atoms, atoms * factors[:, None])
    )
    np.testing.assert_allclose(second.codes * factors, first.codes, rtol=1e-12, atol=1e-14)
    assert np.array_equal(first.status, second.status)
    both = nnls(2.0**40 * (atoms @ atoms.T), 2.0**40 * (targets @ atoms.T), simplex=simplex, backend=backend)
    assert np.array_equal(both.codes, first.codes)


def test_norms_that_differ_by_a_hundred_thousand(backend):
    rng = np.random.default_rng(7)
    for _ in range(100 if backend == "reference" else 300):
        m = int(rng.integers(2, 9))
        a = rng.standard_normal((m + int(rng.integers(0, 4)), m)) * 10.0 ** rng.uniform(-3, 3, m)
        b = rng.standard_normal(len(a))
        result = nnls(a.T @ a, (b @ a)[None], backend=backend)
        sizes = np.linalg.norm(a, axis=0)
        best = scipy.optimize.nnls(a / sizes, b)[0] / sizes
        assert energy(a, b, result.codes[0]) <= energy(a, b, best) + 1e-6


@pytest.mark.parametrize("scale", [1e-155, 1e155, 1e-310, 1e-320, 1e307])
def test_numbers_at_the_end_of_the_range(backend, scale):
    g, c = scale * np.array([[2.0, 1.0], [1.0, 2.0]]), scale * np.array([[3.0, 3.0]])
    for simplex in (False, True):
        result = nnls(g, c, simplex=simplex, backend=backend)
        np.testing.assert_allclose(result.codes, np.full((1, 2), 0.5 if simplex else 1.0), rtol=1e-12)
        assert result.status[0] == NnlsStatus.OPTIMAL


def test_an_overflow_is_a_status(backend):
    result = nnls(1e-200 * np.eye(2), [[1e200, 0.5e200]], backend=backend)
    assert result.status[0] == NnlsStatus.OVERFLOW
    assert (result.codes == np.finfo(float).max).all() and np.isfinite(result.scaled_residual).all()
    result = nnls(1e-200 * np.eye(2), [[1e200, 0.5e200]], simplex=True, backend=backend)
    assert result.status[0] == NnlsStatus.OVERFLOW and result.codes.sum() == 1.0
    result = nnls(np.eye(2), [[-1e308, 1.5e308]], l1=1e308, backend=backend)
    np.testing.assert_allclose(result.codes, [[0.0, 0.5e308]])


def test_negative_curvature_is_a_status(backend):
    for simplex in (False, True):
        result = nnls([[1.0, 2.0], [2.0, 1.0]], [[1.0, 1.0]], simplex=simplex, backend=backend)
        assert result.status[0] == NnlsStatus.INDEFINITE
    hidden = [[1.0, 0.9, 0.0], [0.9, 1.0, 0.9], [0.0, 0.9, 1.0]]  # no pair of atoms shows it
    assert nnls(hidden, [[1.0, 1.0, 1.0]], backend=backend).status[0] == NnlsStatus.INDEFINITE


def test_a_negative_zero_on_the_diagonal_is_a_zero(backend):
    result = nnls(np.diag([1.0, -0.0]), [[1.0, 1.0]], backend=backend)
    assert result.status[0] == NnlsStatus.SINGULAR
    np.testing.assert_array_equal(result.codes, [[1.0, 0.0]])


def test_no_atoms_is_an_empty_answer(backend):
    for simplex in (False, True):
        result = nnls(np.zeros((0, 0)), np.zeros((3, 0)), simplex=simplex, backend=backend)
        assert result.codes.shape == (3, 0)
        assert simplex or (result.status == NnlsStatus.OPTIMAL).all()


def test_refinement_needs_the_matrix(backend):
    """Powers of numbers in (0, 1]: the condition number of the Gram matrix is that of the matrix squared."""
    a = np.vander(np.linspace(0.1, 1.0, 20), 8)
    x = np.arange(1.0, 9.0)
    b = a @ x
    result = nnls(a.T @ a, (b @ a)[None], refine=(a, b), backend=backend)
    np.testing.assert_allclose(result.codes[0], x, rtol=1e-9)
    assert result.status[0] == NnlsStatus.OPTIMAL
    assert np.abs(nnls(a.T @ a, (b @ a)[None], backend=backend).codes[0] - x).max() > 1e-6
