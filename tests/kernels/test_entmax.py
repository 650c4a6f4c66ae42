import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from globe.kernels import entmax, entmax_backward, entmax_inverse

ALPHAS = [1.05, 1.25, 1.5, 1.75, 2.0]
rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, -1e300, 1e6, -np.inf])),
).filter(lambda z: np.isfinite(z).any(axis=1).all())


def reference(z, alpha):
    z = (alpha - 1) * z
    power = 1 / (alpha - 1)
    tau = scipy.optimize.brentq(lambda t: (np.maximum(z - t, 0) ** power).sum() - 1, z.max() - 1, z.max(), xtol=1e-15)
    return np.maximum(z - tau, 0) ** power


@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_root_finding(alpha):
    z = np.random.default_rng(0).standard_normal((50, 17)) * 2
    expected = np.array([reference(row / 0.7, alpha) for row in z])
    np.testing.assert_allclose(entmax(z, alpha, temperature=0.7), expected, atol=1e-9)


def test_sparsemax_is_the_projection_on_the_simplex():
    z = np.random.default_rng(1).standard_normal(6)
    result = scipy.optimize.minimize(
        lambda p: ((p - z) ** 2).sum(),
        np.full(6, 1 / 6),
        bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(entmax(z, 2.0), result.x, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from(ALPHAS))
def test_rows_are_probabilities_in_the_order_of_the_logits(z, alpha):
    p = entmax(z, alpha)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-12)
    assert (p[np.isneginf(z)] == 0).all()
    for row, probabilities in zip(z, p, strict=True):
        assert (np.diff(probabilities[np.argsort(row, kind="stable")]) >= -1e-15).all()
        for value in np.unique(row):
            assert np.ptp(probabilities[row == value]) == 0  # ties share


@settings(max_examples=50, deadline=None)
@given(rows, st.sampled_from(ALPHAS), st.floats(0.1, 3))
def test_inverse_comes_back(z, alpha, temperature):
    p = entmax(z, alpha)
    np.testing.assert_allclose(
        entmax(entmax_inverse(p, alpha, temperature=temperature), alpha, temperature=temperature), p, atol=1e-9
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_backward_matches_differences(alpha):
    rng = np.random.default_rng(2)
    z, dy, step = rng.standard_normal(8), rng.standard_normal(8), 1e-6
    y = entmax(z, alpha, temperature=0.6)
    expected = [
        (entmax(z + e, alpha, temperature=0.6) - entmax(z - e, alpha, temperature=0.6)) @ dy / (2 * step)
        for e in np.eye(8) * step
    ]
    np.testing.assert_allclose(entmax_backward(y, dy, alpha, temperature=0.6), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    z = np.zeros((2, 3), dtype)
    p = entmax(z)
    assert p.dtype == entmax_backward(p, p).dtype == entmax_inverse(p).dtype == dtype


def test_epsilon_prunes_and_renormalises():
    z = np.log([0.6, 0.3, 0.1]) * 1.01
    p = entmax(z, 1.05, epsilon=0.15)
    assert p[2] == 0 and p.sum() == pytest.approx(1)
    assert (entmax(np.zeros(10), epsilon=0.5) == 0.1).all()  # the largest stay


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows(bad):
    with pytest.raises(ValueError, match="^logits: found"):
        entmax(np.array([[0.0, 1.0], [bad, 0.0]]))
    with pytest.raises(ValueError, match="^logits: found"):
        entmax(np.full((1, 3), -np.inf))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="^alpha: found"):
        entmax(np.zeros(2), 1.0)
    with pytest.raises(ValueError, match="^temperature: found"):
        entmax(np.zeros(2), temperature=0.0)
    with pytest.raises(ValueError, match="^epsilon: found"):
        entmax(np.zeros(2), epsilon=1.0)
    with pytest.raises(ValueError, match="^gradient: found"):
        entmax_backward(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="^probabilities: "):
        entmax_inverse(np.ones(2))
