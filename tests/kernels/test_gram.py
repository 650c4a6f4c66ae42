import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from globe.kernels import gram

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_float64(dtype, weighted):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 1000)).astype(dtype)
    w = rng.uniform(0, 2, 1000) if weighted else None
    exact = x.astype(np.float64)
    expected = (exact * (1.0 if w is None else w)) @ exact.T
    result = gram(x, weights=w, block=96)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(0, 200), block=st.integers(1, 64), seed=st.integers(0, 99))
def test_symmetric_and_semidefinite(n, k, block, seed):
    x = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    g = gram(x, block=block)
    assert np.array_equal(g, g.T)
    assert np.linalg.eigvalsh(g).min() >= -1e-5 * (1 + np.abs(g).max())


def test_long_sums_keep_their_accuracy():
    x = np.ones((1, 1 << 18), np.float32) * np.float32(0.1)
    assert gram(x)[0, 0] == pytest.approx((1 << 18) * float(np.float32(0.1)) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"vectors": np.zeros(3, np.float32)}, "vectors"),
        ({"vectors": np.zeros((2, 3), np.int32)}, "vectors"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2, -1]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2, np.nan]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "block": 0}, "block"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        gram(**arguments)
