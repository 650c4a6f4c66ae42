import numpy as np
import pytest
import scipy.optimize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from globe.kernels import entmax, entmax_backward, entmax_inverse

ALPHAS = [1.0001, 1.05, 1.25, 1.5, 1.75, 1.99, 2.0]
DTYPES = [np.float32, np.float64]
SIZES = [1, 2, 7, 16, 17, 63, 64, 65, 130, 512, 5000]  # around the widths of vectors, and long rows
EPS = {np.float32: 2e-6, np.float64: 1e-11}

tall = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([0.0, 1.0, -1e30, 1e6, -np.inf]))
rows = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(1, 4), st.integers(1, 90)), elements=tall)
)
rows = rows.filter(lambda z: np.isfinite(z).any(axis=1).all())
properties = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def logits(size, dtype=np.float64, seed=0):
    """Rows of several scales, with ties and -inf."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((6, size)) * np.array([[0.01], [0.3], [1], [1], [3], [30]])
    z[2] = np.round(2 * z[2]) / 2
    z[3, 1:][rng.random(size - 1) < 0.3] = -np.inf
    return z.astype(dtype)


def by_root_finding(row, alpha):
    """Shares by their definition, from a root of Σ shares = 1 in 1 + τ."""
    less, power = (alpha - 1) * (row - row.max()), 1 / (alpha - 1)

    def shares(shift):
        with np.errstate(divide="ignore"):
            return np.exp(power * np.log1p(np.maximum(less - shift, -1)))

    high = -np.expm1(-np.log(row.size) / power) + 1e-15
    shift = scipy.optimize.brentq(lambda t: shares(t).sum() - 1, 0, high, xtol=1e-18, rtol=1e-15)
    p = shares(shift)
    return p / p.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_root_finding(backend, alpha, dtype):
    for size in SIZES:
        z = logits(size, dtype)
        expected = np.array([by_root_finding(row / 0.7, alpha) for row in z.astype(np.float64)])
        result = entmax(z, alpha, temperature=0.7, backend=backend)
        assert result.dtype == dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=EPS[dtype], err_msg=f"d = {size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_matches_the_entmax_package(backend, alpha, dtype):
    torch, package = pytest.importorskip("torch"), pytest.importorskip("entmax")
    z = np.random.default_rng(1).standard_normal((40, 300)).astype(dtype)
    leaf = torch.from_numpy(z).requires_grad_()
    maps = {1.5: package.entmax15, 2.0: package.sparsemax}
    expected = maps[alpha](leaf) if alpha in maps else package.entmax_bisect(leaf, alpha, n_iter=60)
    y = entmax(z, alpha, backend=backend)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=0, atol=EPS[dtype])
    dy = np.random.default_rng(2).standard_normal(z.shape).astype(dtype)
    (slope,) = torch.autograd.grad(expected, leaf, torch.from_numpy(dy))
    atol = {np.float32: 2e-5, np.float64: 1e-7}[dtype]  # theirs has the errors of its own probabilities
    np.testing.assert_allclose(entmax_backward(y, dy, alpha, backend=backend), slope.numpy(), rtol=0, atol=atol)


def test_sparsemax_is_the_projection_on_the_simplex(backend):
    z = np.random.default_rng(1).standard_normal(6)
    result = scipy.optimize.minimize(
        lambda p: ((p - z) ** 2).sum(),
        np.full(6, 1 / 6),
        bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(entmax(z, 2.0, backend=backend), result.x, atol=1e-6)


def test_alpha_near_one_is_softmax(backend):
    z = np.random.default_rng(3).standard_normal((3, 200))
    softmax = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    for dtype in DTYPES:
        result = entmax(z.astype(dtype), 1 + 1e-9, backend=backend)
        np.testing.assert_allclose(result, softmax, rtol=1e-5, atol=EPS[dtype])


@properties
@given(rows, st.sampled_from(ALPHAS), st.sampled_from([0.0, 0.05, 0.9]))
def test_rows_are_probabilities_in_the_order_of_the_logits(backend, z, alpha, epsilon):
    p = entmax(z, alpha, epsilon=epsilon, backend=backend)
    tolerance = 4 * np.finfo(z.dtype).eps
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1, dtype=np.float64), 1, rtol=EPS[z.dtype.type])
    assert (p[np.isneginf(z)] == 0).all()
    for row, probabilities in zip(z, p, strict=True):
        assert (np.diff(probabilities[np.argsort(row, kind="stable")]) >= -tolerance).all()
        for value in np.unique(row):
            assert np.ptp(probabilities[row == value]) == 0  # ties share
    if epsilon:
        positive = np.where(p > 0, p, np.inf).min(axis=-1)
        assert ((positive >= epsilon * (1 - tolerance)) | (positive == p.max(axis=-1))).all()


@properties
@given(rows, st.sampled_from(ALPHAS), st.integers(-64, 64))
def test_a_shift_changes_nothing(backend, z, alpha, shift):
    z = np.where(np.abs(z) < 10, np.round(z * 64) / 64, -np.inf).astype(z.dtype)  # so that z + shift is exact
    z[:, 0] = 0
    p = entmax(z, alpha, backend=backend)
    assert np.array_equal(entmax(z + z.dtype.type(shift), alpha, backend=backend), p)


@properties
@given(rows, st.sampled_from(ALPHAS), st.sampled_from([0.0, 0.1]), st.integers(2, 5))
def test_threads_change_no_bit(backend, z, alpha, epsilon, threads):
    z = np.tile(z, (-(-40_000 // z.size), 1))  # enough for several threads
    options = {"alpha": alpha, "temperature": 0.8, "backend": backend}
    y = entmax(z, epsilon=epsilon, threads=1, **options)
    assert y.tobytes() == entmax(z, epsilon=epsilon, threads=threads, **options).tobytes()
    dy = np.random.default_rng(0).standard_normal(z.shape)
    dz = entmax_backward(y, dy, threads=1, **options)
    assert dz.tobytes() == entmax_backward(y, dy, threads=threads, **options).tobytes()


@settings(properties, max_examples=20)
@given(rows, st.sampled_from([1.05, 1.25, 1.5, 1.75, 2.0]), st.floats(0.1, 3))
def test_inverse_comes_back(backend, z, alpha, temperature):
    p = entmax(z, alpha, backend=backend)
    again = entmax_inverse(p, alpha, temperature=temperature)
    tolerance = {np.float32: 2e-5, np.float64: 1e-9}[z.dtype.type]
    result = entmax(again, alpha, temperature=temperature, backend=backend)
    np.testing.assert_allclose(result, p, rtol=0, atol=tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_backward_matches_differences(backend, alpha):
    rng = np.random.default_rng(2)
    z, dy, step = rng.standard_normal(80), rng.standard_normal(80), 1e-6
    options = {"alpha": alpha, "temperature": 0.6, "backend": backend}
    ahead, behind = (entmax(z + sign * step * np.eye(80), **options) for sign in (1, -1))
    expected = (ahead - behind) @ dy / (2 * step)
    np.testing.assert_allclose(entmax_backward(entmax(z, **options), dy, **options), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_backward_matches_its_formula(backend, alpha, dtype):
    for size in SIZES:
        y = entmax(logits(size, dtype), alpha)
        y[0, -1] = np.finfo(dtype).smallest_subnormal
        y[1] = 0  # no support: no gradient
        dy = np.random.default_rng(4).standard_normal(y.shape).astype(dtype)
        s = np.where(y > 0, y.astype(np.float64) ** (2 - alpha), 0)
        expected = s * (dy - (s * dy).sum(axis=1, keepdims=True) / np.maximum(s.sum(axis=1, keepdims=True), 1e-300))
        dy[y == 0] = np.nan  # not looked at
        result = entmax_backward(y, dy, alpha, temperature=0.5, backend=backend)
        assert result.dtype == dtype and not result[y == 0].any()
        np.testing.assert_allclose(result, expected / 0.5, rtol=0, atol=4 * EPS[dtype], err_msg=f"d = {size}")


def test_dtypes_shapes_and_layouts(backend):
    for dtype in DTYPES:
        p = entmax(np.zeros((2, 3), dtype), backend=backend)
        assert p.dtype == entmax_backward(p, p, backend=backend).dtype == entmax_inverse(p).dtype == dtype
    for dtype in (np.int64, np.float16, ">f4"):
        assert entmax(np.zeros(3, dtype), backend=backend).dtype == np.float64
    z = np.random.default_rng(5).standard_normal((4, 5, 6))
    p = entmax(z, backend=backend)
    assert p.shape == z.shape
    assert np.array_equal(entmax(z.reshape(20, 6), backend=backend), p.reshape(20, 6))
    assert np.array_equal(entmax(z[::2, ::-1, 1:], backend=backend), entmax(z[::2, ::-1, 1:].copy(), backend=backend))
    assert np.array_equal(entmax(z.tolist(), backend=backend), p)
    assert entmax(np.zeros((0, 3)), backend=backend).shape == (0, 3)
    assert entmax_backward(np.zeros((0, 3)), np.zeros((0, 3)), backend=backend).shape == (0, 3)
    assert entmax(np.float64(-7).reshape(1), backend=backend).tolist() == [1.0]
    z.setflags(write=False)
    assert np.array_equal(entmax(z, backend=backend), p)


def test_writes_where_it_is_told(backend):
    z = np.random.default_rng(7).standard_normal((3, 4, 50)).astype(np.float32)
    y, dz = np.full_like(z, 7), np.full_like(z, 7)
    assert entmax(z, out=y, backend=backend) is y and np.array_equal(y, entmax(z, backend=backend))
    assert entmax_backward(y, z, out=dz, backend=backend) is dz
    assert np.array_equal(dz, entmax_backward(y, z, backend=backend))
    both = np.zeros((2, 5))
    for out in (np.zeros(5), np.zeros((2, 5), np.float32), np.zeros((5, 2)).T, np.broadcast_to(0.0, (2, 5)), both):
        for call in (lambda out=out: entmax(both, out=out), lambda out=out: entmax_backward(both + 1, both, out=out)):
            with pytest.raises(ValueError, match="^out: found"):
                call()


def test_epsilon_prunes_and_renormalises(backend):
    z = np.log([0.6, 0.3, 0.1]) * 1.01
    p = entmax(z, 1.05, epsilon=0.15, backend=backend)
    assert p[2] == 0 and p.sum() == pytest.approx(1)
    flat = entmax(np.zeros(10), epsilon=0.5, backend=backend)
    np.testing.assert_allclose(flat, 0.1, rtol=1e-15)  # the largest stay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1 + 1e-12, 1.3, 1.5, 2.0])
def test_extremes(backend, alpha, dtype):
    most = np.finfo(dtype).max
    z = np.tile(np.array([most, -most, -np.inf, most, 0, most], dtype), 20)
    for temperature in (5e-324, 1e-30, 1.0, 1e30, 1e308):
        p = entmax(z, alpha, temperature=temperature, backend=backend)
        assert p.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        assert (p[z == most] == p[0]).all() and p[0] > 0 and not p[np.isneginf(z)].any()


def test_long_rows_keep_their_accuracy(backend):
    z = np.random.default_rng(6).standard_normal((1, 60_000)).astype(np.float32)
    for alpha, temperature in ((1.25, 4.0), (1.5, 50.0), (2.0, 300.0)):
        p = entmax(z, alpha, temperature=temperature, backend=backend)
        exact = entmax(z.astype(np.float64), alpha, temperature=temperature, backend="reference")
        assert p.sum(dtype=np.float64) == pytest.approx(1, abs=2e-6)
        np.testing.assert_allclose(p, exact, rtol=0, atol=1e-5 * exact.max())


@pytest.mark.parametrize("size", [1, 5, 70, 300])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_bad_rows_are_refused(backend, alpha, size):
    for bad in (np.nan, np.inf, -np.inf):
        z = np.zeros((500, size), np.float32)
        z[123, :] = -np.inf if bad == -np.inf else 0
        z[123, size // 2] = z[321, -1] = bad
        with pytest.raises(ValueError, match=r"^logits: found .* in row 123;"):
            entmax(z, alpha, backend=backend)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: entmax(np.zeros(2), 1.0), "alpha"),
        (lambda: entmax(np.zeros(2), np.nan), "alpha"),
        (lambda: entmax(np.zeros(2), temperature=0.0), "temperature"),
        (lambda: entmax(np.zeros(2), temperature=np.inf), "temperature"),
        (lambda: entmax(np.zeros(2), epsilon=1.0), "epsilon"),
        (lambda: entmax(np.zeros(2), epsilon=np.nan), "epsilon"),
        (lambda: entmax(np.zeros(2), threads=0), "threads"),
        (lambda: entmax(np.zeros(2), backend="fortran"), "backend"),
        (lambda: entmax(np.zeros((3, 0))), "logits"),
        (lambda: entmax(np.float64(1)), "logits"),
        (lambda: entmax(np.zeros(3, complex)), "logits"),
        (lambda: entmax_backward(np.ones(2), np.ones(3)), "gradient"),
        (lambda: entmax_backward(np.ones(2), np.ones(2, complex)), "gradient"),
        (lambda: entmax_backward(np.ones(2), np.ones(2), 2.5), "alpha"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        call()


def test_inverse_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="^probabilities: "):
        entmax_inverse(np.ones(2))
