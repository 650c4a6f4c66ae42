"""Non-negative least squares on problems that make active-set methods cycle, stall or divide by zero."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_nnls import assert_optimal, data, objective, violation

from globe.kernels import NnlsStatus, nnls

properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# On this matrix, exchanging all infeasible atoms at once goes round in a circle of three supports (Curtis, Han
# and Robinson, "A globally convergent primal-dual active-set framework for large-scale convex quadratic
# optimization", Comput. Optim. Appl. 60, 2015).
CYCLE = np.array([[4.0, 5.0, -5.0], [5.0, 9.0, -5.0], [-5.0, -5.0, 7.0]])
SIDE = np.array([-2.0, -1.0, 3.0])


def unguarded_exchange_cycles(g, c, support):
    seen = set()
    while support.tobytes() not in seen:
        seen.add(support.tobytes())
        x = np.zeros_like(c)
        x[support] = np.linalg.solve(g[np.ix_(support, support)], c[support])
        following = np.where(support, x >= 0, c - g @ x > 1e-12)
        if np.array_equal(following, support):
            return False
        support = following
    return True


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize("start", [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]])
def test_the_cycling_family_is_solved(backend, blocks, start):
    g, c = scipy.linalg.block_diag(*[CYCLE] * blocks), np.tile(SIDE, blocks)
    guess = np.tile(np.array(start, bool), blocks)
    assert unguarded_exchange_cycles(g, c, guess)
    result = nnls(g, c[None], warm_start=guess[None], backend=backend)
    assert_optimal(result, g, c[None])
    np.testing.assert_allclose(result.codes[0], np.tile(scipy.optimize.nnls(*root(CYCLE, SIDE))[0], blocks), atol=1e-12)
    assert_optimal(nnls(g, c[None], simplex=True, warm_start=guess[None], backend=backend), g, c[None], simplex=True)


def root(g, c):
    """Atoms and a target with this Gram matrix and these correlations."""
    lower = np.linalg.cholesky(g)
    return lower.T, np.linalg.solve(lower, c)


def test_a_cycling_block_in_a_large_problem_is_solved(backend):
    _, _, g, c = data(120, 130, 5)
    g, c = scipy.linalg.block_diag(g, CYCLE, g), np.concatenate([c, np.tile(SIDE, (5, 1)), c], axis=1)
    assert_optimal(nnls(g, c, backend=backend), g, c)


@pytest.mark.parametrize("m", [5, 12, 24])
def test_least_index_rules_need_exponentially_many_steps_here(backend, m):
    # Fathi, "Computational complexity of LCPs associated with positive definite symmetric matrices", Math.
    # Program. 17, 1979.
    lower = np.eye(m) + 2 * np.tri(m, k=-1)
    g, c = lower @ lower.T, np.ones((1, m))
    result = nnls(g, c, backend=backend)
    assert_optimal(result, g, c)
    assert result.iterations[0] <= 3 * m


@properties
@given(
    entries=st.lists(st.integers(-4, 4), min_size=9, max_size=9),
    side=st.lists(st.integers(-4, 4), min_size=3, max_size=3),
    guess=st.lists(st.booleans(), min_size=3, max_size=3),
    simplex=st.booleans(),
)
def test_small_integers_full_of_ties(backend, entries, side, guess, simplex):
    atoms = np.array(entries, float).reshape(3, 3)
    g, c = atoms @ atoms.T, (atoms @ np.array(side, float))[None]
    result = nnls(g, c, simplex=simplex, warm_start=np.array([guess]), backend=backend)
    assert_optimal(result, g, c, simplex=simplex)


@properties
@given(
    m=st.integers(1, 12),
    k=st.integers(1, 16),
    copies=st.integers(0, 4),
    noise=st.sampled_from([0.0, 1e-14, 1e-10, 1e-7, 1e-4]),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    simplex=st.booleans(),
    seed=st.integers(0, 999),
)
def test_duplicates_near_duplicates_and_any_scale(backend, m, k, copies, noise, scale, simplex, seed):
    rng = np.random.default_rng(seed)
    atoms, targets, _, _ = data(m, k, 5, seed)
    again = atoms[rng.integers(0, m, copies)] + noise * rng.standard_normal((copies, k))
    atoms = np.concatenate([atoms, again]) * scale
    g, c = atoms @ atoms.T, targets @ atoms.T
    result = nnls(g, c, simplex=simplex, backend=backend)
    assert (result.codes >= 0).all()
    assert (result.status != NnlsStatus.NOT_CONVERGED).all()
    assert (result.kkt_residual <= 1e-10).all()
    solved = result.status == NnlsStatus.OPTIMAL
    assert solved.all() or 0 < noise < 1e-6
    assert (violation(g, c[solved], result.codes[solved], simplex=simplex) <= 1e-9).all()


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("l1", [0.0, 0.7])
def test_a_rank_deficient_gram_matrix_is_no_obstacle(backend, rank, l1):
    atoms, targets, g, c = data(25, rank, 30)
    for simplex in (False, True):
        penalty = 0.0 if simplex else l1
        result = nnls(g, c, l1=penalty, simplex=simplex, backend=backend)
        assert_optimal(result, g, c, l1=penalty, simplex=simplex)
    if l1 == 0.0:
        for t, codes in zip(targets, nnls(g, c, backend=backend).codes, strict=True):
            _, norm = scipy.optimize.nnls(atoms.T, t)
            assert np.linalg.norm(codes @ atoms - t) == pytest.approx(norm, rel=1e-6, abs=1e-6)


def test_many_dependent_atoms(backend):
    _, _, g, c = data(200, 60, 4)
    for simplex in (False, True):
        assert_optimal(nnls(g, c, simplex=simplex, backend=backend), g, c, simplex=simplex)
        everything = np.ones(c.shape, bool)
        result = nnls(g, c, simplex=simplex, warm_start=everything, backend=backend)
        assert_optimal(result, g, c, simplex=simplex)


def test_an_ill_conditioned_gram_matrix(backend):
    inverse = 1.0 / (np.arange(12)[:, None] + np.arange(12) + 1)  # Hilbert's; condition number 1e16
    c = inverse @ np.random.default_rng(0).random((12, 6))
    for simplex in (False, True):
        result = nnls(inverse, c.T, simplex=simplex, backend=backend)
        assert (result.status != NnlsStatus.NOT_CONVERGED).all()
        assert (violation(inverse, c.T, result.codes, simplex=simplex) <= 1e-9).all()


def test_opposite_atoms_with_a_penalty(backend):
    # Unbounded without the sign constraint, singular at once if both enter.
    g = np.array([[1.0, -1.0], [-1.0, 1.0]])
    result = nnls(g, np.array([[1.0, -1.0], [-1.0, 1.0]]), l1=0.25, backend=backend)
    np.testing.assert_allclose(result.codes, [[0.75, 0], [0, 0.75]])


def test_a_better_copy_replaces_the_one_in_use(backend):
    # The correlations are outside the range of the Gram matrix, but there is a minimum: the second atom alone.
    g, c = np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    result = nnls(g, c, backend=backend)
    assert_optimal(result, g, c)
    np.testing.assert_allclose(objective(g, c, result.codes), [-2, -2, -0.5])


def test_a_problem_without_minimum_is_reported(backend):
    # The objective falls for ever along the second atom in the first row; the first atom is still fitted.
    g = np.diag([2.0, 0.0])
    result = nnls(g, np.array([[1.0, 1.0], [1.0, -1.0]]), backend=backend)
    assert result.status.tolist() == [NnlsStatus.SINGULAR, NnlsStatus.OPTIMAL]
    np.testing.assert_allclose(result.codes, [[0.5, 0], [0.5, 0]])


def test_zeros(backend):
    result = nnls(np.zeros((3, 3)), np.zeros((2, 3)), backend=backend)
    assert not result.codes.any() and (result.status == 0).all() and not result.kkt_residual.any()
    warm = nnls(np.eye(3), np.zeros((1, 3)), warm_start=np.ones((1, 3), bool), backend=backend)
    assert not warm.codes.any() and warm.status[0] == NnlsStatus.OPTIMAL
    np.testing.assert_allclose(nnls(np.zeros((2, 2)), [[0.0, 1.0]], simplex=True, backend=backend).codes, [[0, 1]])
    zero_atom = nnls(np.diag([1.0, 0.0]), [[0.25, 0.0]], simplex=True, backend=backend)
    np.testing.assert_allclose(zero_atom.codes, [[0.25, 0.75]])
    assert_optimal(
        nnls(np.zeros((2, 2)), [[0.0, 0.0]], simplex=True, backend=backend), np.zeros((2, 2)), np.zeros((1, 2))
    )


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_extreme_scales(backend, scale):
    _, _, g, c = data(10, 15, 6)
    for simplex in (False, True):
        expected = nnls(g, c, simplex=simplex, backend=backend).codes
        result = nnls(g * scale, c * scale, simplex=simplex, backend=backend)
        assert (result.status == NnlsStatus.OPTIMAL).all()
        np.testing.assert_allclose(result.codes, expected, rtol=1e-9, atol=1e-12)
