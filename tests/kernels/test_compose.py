import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.kernels import compose, compose_bank_gradient, compose_code_gradient

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


def problem(n=6, m=9, shape=(5, 300), dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((n, m)) * (rng.random((n, m)) < 0.4)
    return codes.astype(np.float32), rng.standard_normal((m, *shape)).astype(dtype)


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("sparse", [None, scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_matches_dense(backend, bank_dtype, out_dtype, sparse):
    codes, bank = problem(dtype=bank_dtype)
    result = compose(codes if sparse is None else sparse(codes), bank, dtype=out_dtype, backend=backend)
    assert result.dtype == (out_dtype or bank_dtype)
    expected = np.einsum("nm,mab->nab", codes.astype(np.float64), bank.astype(np.float64))
    step = float(ml_dtypes.finfo(result.dtype).eps)
    np.testing.assert_allclose(result.astype(np.float64), expected, rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounds_as_numpy_does(backend, dtype):
    codes, bank = problem(shape=(4000,))
    bank *= np.logspace(-8, 4, 4000, dtype=np.float32)
    full = compose(codes, bank, backend=backend)
    with np.errstate(over="ignore"):
        expected = full.astype(dtype)
    assert np.array_equal(compose(codes, bank, dtype=dtype, backend=backend).view(np.uint16), expected.view(np.uint16))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 8),
    m=st.integers(1, 8),
    width=st.integers(0, 3000),
    threads=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_threads_change_no_bit(backend, n, m, width, threads, dtype, seed):
    codes, bank = problem(n, m, (width,), dtype, seed)
    one = compose(codes, bank, threads=1, backend=backend)
    assert one.shape == (n, width)
    assert one.tobytes() == compose(codes, bank, threads=threads, backend=backend).tobytes()
    products = compose_code_gradient(codes, one, bank, threads=1, backend=backend)
    again = compose_code_gradient(codes, one, bank, threads=threads, backend=backend)
    assert products.data.tobytes() == again.data.tobytes()


def test_epsilon_skips_small_codes(backend):
    codes, bank = problem()
    pruned = np.where(np.abs(codes) < 0.5, 0, codes)
    assert np.array_equal(compose(codes, bank, epsilon=0.5, backend=backend), compose(pruned, bank, backend=backend))


def test_duplicate_entries_add_up(backend):
    codes = scipy.sparse.csr_array((np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 2])), shape=(1, 2))
    assert compose(codes, np.ones((2, 3), np.float32), backend=backend).tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("width", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_pass_through(backend, dtype, width):
    bank = np.resize(np.array([np.inf, np.nan, -np.inf, 1.0]), (1, width)).astype(dtype)
    result = compose(np.ones((1, 1)), bank, backend=backend).astype(np.float32)
    np.testing.assert_array_equal(result, bank.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_pattern_comes_back(backend, dtype):
    bank = np.arange(1 << 16, dtype=np.uint16).view(dtype)[None]
    result = compose(np.ones((1, 1)), bank, backend=backend)
    number = ~np.isnan(bank.astype(np.float32))
    assert np.isnan(result.astype(np.float32))[~number].all()
    positive = number & (bank.view(np.uint16) != 0x8000)  # 0 + (−0) = 0
    assert np.array_equal(result.view(np.uint16)[positive], bank.view(np.uint16)[positive])


def test_writes_where_it_is_told(backend):
    codes, bank = problem(n=70, m=9, shape=(1 << 16,), dtype=BF16)
    bytes_of_it = np.zeros(70 * (1 << 17) + 64, np.uint8)
    start = -bytes_of_it.ctypes.data % 64
    out = bytes_of_it[start : start + 70 * (1 << 17)].view(BF16).reshape(70, 1 << 16)
    assert compose(codes, bank, out=out, backend=backend) is out  # aligned and large: written past the caches
    assert np.array_equal(out.view(np.uint16), compose(codes, bank, backend=backend).view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 5000])
def test_derivatives_match_dense_products(backend, dtype, width):
    codes, bank = problem(shape=(width,), dtype=dtype)
    gradient = np.random.default_rng(1).standard_normal((len(codes), width)).astype(np.float32)
    back = compose_bank_gradient(codes, gradient, backend=backend)
    np.testing.assert_allclose(back, codes.T @ gradient, rtol=1e-5, atol=1e-5)
    found = compose_code_gradient(codes, gradient, bank, backend=backend)
    expected = (gradient.astype(np.float64) @ bank.astype(np.float64).T) * (codes != 0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5, atol=2e-6 * width)
    mirrored = compose_code_gradient(codes, gradient.astype(dtype), bank.astype(np.float32), backend=backend)
    np.testing.assert_allclose(mirrored.toarray(), expected, rtol=0.05, atol=0.05 * np.sqrt(width))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"codes": np.zeros(3)}, "codes"),
        ({"codes": scipy.sparse.csc_array(np.zeros((2, 3)))}, "codes"),
        ({"bank": np.zeros((4, 5), np.float32)}, "bank"),
        ({"bank": np.zeros((3, 5))}, "bank"),
        ({"bank": np.zeros((5, 3), np.float32).T}, "bank"),
        ({"dtype": np.float64}, "dtype"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": np.nan}, "epsilon"),
        ({"threads": 0}, "threads"),
        ({"backend": "fortran"}, "backend"),
        ({"out": np.zeros((2, 4), np.float32)}, "out"),
        ({"out": np.zeros((2, 5), np.float16), "dtype": np.float32}, "out"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {"codes": np.zeros((2, 3)), "bank": np.zeros((3, 5), np.float32), **change}
    with pytest.raises(ValueError, match=f"^{name}: found"):
        compose(arguments.pop("codes"), arguments.pop("bank"), **arguments)


def test_the_environment_chooses_a_backend(monkeypatch):
    monkeypatch.setenv("GLOBE_BACKEND", "fortran")
    with pytest.raises(ValueError, match="^GLOBE_BACKEND: found 'fortran'"):
        compose(np.zeros((2, 3)), np.zeros((3, 5), np.float32))


def test_the_gradient_must_fit_the_bank():
    with pytest.raises(ValueError, match="^gradient: found rows of shape"):
        compose_code_gradient(np.zeros((2, 3)), np.zeros((2, 4), np.float32), np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match="^gradient: found 3 vectors"):
        compose_bank_gradient(np.zeros((2, 3)), np.zeros((3, 4), np.float32))


def test_column_outside_the_bank_is_caught():
    codes = scipy.sparse.csr_array(np.eye(2, dtype=np.float32))
    codes.indices[1] = 7
    with pytest.raises(ValueError, match="^codes: found column 7"):
        compose(codes, np.ones((2, 3), np.float32))
