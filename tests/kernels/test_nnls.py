import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from globe.kernels import NnlsStatus, nnls


def data(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, k)) + 0.5
    return atoms, rng.standard_normal((n, k)) + 0.3


def objective(g, c, x):
    return 0.5 * np.einsum("ni,ij,nj->n", x, g, x) - (c * x).sum(axis=1)


@pytest.mark.parametrize(("m", "k"), [(1, 5), (5, 8), (30, 40), (64, 64)])
def test_matches_scipy(m, k):
    atoms, targets = data(m, k, 20)
    result = nnls(atoms @ atoms.T, targets @ atoms.T)
    expected = np.array([scipy.optimize.nnls(atoms.T, t)[0] for t in targets])
    assert (result.status == NnlsStatus.OPTIMAL).all()
    assert result.codes.shape == (20, m) and result.status.dtype == np.int8
    np.testing.assert_allclose(result.codes, expected, atol=1e-7 * max(1, np.abs(expected).max()))


def test_l1_is_a_shift():
    atoms, targets = data(12, 20, 10)
    g, c = atoms @ atoms.T, targets @ atoms.T
    np.testing.assert_allclose(nnls(g, c, l1=2.0).codes, nnls(g, c - 2.0).codes)
    assert not nnls(g, c, l1=1e6).codes.any()


def test_simplex_matches_slsqp():
    atoms, targets = data(6, 9, 8)
    g, c = atoms @ atoms.T, targets @ atoms.T
    result = nnls(g, c, simplex=True)
    assert (result.status == NnlsStatus.OPTIMAL).all()
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


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 12),
    k=st.integers(1, 16),
    copies=st.integers(0, 4),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    simplex=st.booleans(),
    seed=st.integers(0, 999),
)
def test_optimality_with_duplicates_and_any_scale(m, k, copies, scale, simplex, seed):
    atoms, targets = data(m, k, 5, seed)
    atoms = np.concatenate([atoms, atoms[np.random.default_rng(seed).integers(0, m, copies)]]) * scale
    g, c = atoms @ atoms.T, targets @ atoms.T
    result = nnls(g, c, simplex=simplex)
    x = result.codes
    assert (x >= 0).all()
    assert (result.status != NnlsStatus.NOT_CONVERGED).all()
    assert (result.kkt_residual <= 1e-10).all()
    gradient = x @ g - c
    if simplex:
        np.testing.assert_allclose(x.sum(axis=1), 1, rtol=1e-9)
        gradient -= np.array([row[codes > 0].mean() for row, codes in zip(gradient, x, strict=True)])[:, None]
    size = np.abs(c).max(axis=1) + g.max() * x.sum(axis=1)
    assert (gradient.min(axis=1) >= -1e-8 * size).all()
    assert (np.abs(np.where(x > 0, gradient, 0)).max(axis=1) <= 1e-8 * size).all()


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_deficient_gram_reaches_the_optimum(rank):
    atoms, targets = data(25, rank, 30)
    result = nnls(atoms @ atoms.T, targets @ atoms.T)
    for t, codes in zip(targets, result.codes, strict=True):
        _, norm = scipy.optimize.nnls(atoms.T, t)
        assert np.linalg.norm(codes @ atoms - t) == pytest.approx(norm, rel=1e-6, abs=1e-6)


def test_opposite_atoms_with_a_penalty():
    # Unbounded without the sign constraint, singular at once if both enter.
    g = np.array([[1.0, -1.0], [-1.0, 1.0]])
    result = nnls(g, np.array([[1.0, -1.0], [-1.0, 1.0]]), l1=0.25)
    np.testing.assert_allclose(result.codes, [[0.75, 0], [0, 0.75]])


def test_unbounded_problem_is_reported():
    # c has a part outside the range of G, so the objective has no minimum.
    result = nnls(np.ones((2, 2)), np.array([[1.0, 2.0], [1.0, 1.0]]))
    assert result.status[1] == NnlsStatus.OPTIMAL
    assert result.status[0] in (NnlsStatus.OPTIMAL, NnlsStatus.SINGULAR)


def test_zero_cases():
    result = nnls(np.zeros((3, 3)), np.zeros((2, 3)))
    assert not result.codes.any() and (result.status == 0).all()
    assert nnls(np.eye(3), np.zeros((0, 3))).codes.shape == (0, 3)
    np.testing.assert_allclose(nnls(np.zeros((2, 2)), [[0.0, 1.0]], simplex=True).codes, [[0, 1]])
    zero_atom = nnls(np.diag([1.0, 0.0]), [[0.25, 0.0]], simplex=True)
    np.testing.assert_allclose(zero_atom.codes, [[0.25, 0.75]])


def test_limit_is_reported():
    atoms, targets = data(20, 30, 3)
    g, c = atoms @ atoms.T, targets @ atoms.T
    result = nnls(g, c, max_iterations=1)
    assert (result.iterations <= 1).all()
    assert (result.status == NnlsStatus.NOT_CONVERGED).any()


def test_fewer_atoms_never_do_better():
    atoms, targets = data(20, 30, 10)
    g, c = atoms @ atoms.T, targets @ atoms.T
    all_of_them = objective(g, c, nnls(g, c).codes)
    some = objective(g[:10, :10], c[:, :10], nnls(g[:10, :10], c[:, :10]).codes)
    assert (all_of_them <= some + 1e-9).all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"gram": np.zeros((2, 3))}, "gram"),
        ({"gram": np.array([[1.0, 2.0], [0.0, 1.0]])}, "gram"),
        ({"gram": -np.eye(2)}, "gram"),
        ({"gram": np.full((2, 2), np.nan)}, "gram"),
        ({"correlations": np.zeros(2)}, "correlations"),
        ({"correlations": np.full((1, 2), np.inf)}, "correlations"),
        ({"l1": -1.0}, "l1"),
        ({"l1": 1.0, "simplex": True}, "l1"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {"gram": np.eye(2), "correlations": np.zeros((1, 2)), **change}
    with pytest.raises(ValueError, match=f"^{name}: found"):
        nnls(arguments.pop("gram"), arguments.pop("correlations"), **arguments)
