import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.kernels import compose, compose_matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


def problem(tokens=5, n=3, m=7, shape=(11, 150), dtype=np.float32, seed=0):
    """Codes, of which some rows may be empty, a bank, tokens, and each token's row."""
    rng = np.random.default_rng(seed)
    codes = rng.random((n, m), dtype=np.float32) * (rng.random((n, m)) < 0.6)
    bank = rng.standard_normal((m, *shape)).astype(dtype)
    return codes, bank, rng.standard_normal((tokens, shape[1])).astype(dtype), rng.integers(0, n, tokens)


def exact(codes, bank, x, rows):
    mixtures = np.einsum("nm,mrd->nrd", codes.astype(np.float64), bank.astype(np.float64))
    return np.einsum("trd,td->tr", mixtures[rows], x.astype(np.float64))


def relative(found, expected):
    return np.linalg.norm(found.astype(np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_matches_the_products_with_mixtures(backend, bank_dtype, x_dtype, tokens):
    codes, bank, x, rows = problem(tokens, dtype=bank_dtype)
    x = x.astype(x_dtype)
    rounded = 2e-3 if bank_dtype == x_dtype == BF16 and tokens > 8 else 1e-5  # mixtures may be rounded to bfloat16
    found = compose_matmul(codes, bank, x, rows=rows, dtype=np.float32, backend=backend)
    assert relative(found, exact(codes, bank, x, rows)) < rounded


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (25, 513), (24, 512), (50, 1031), (2, 2100)])
@pytest.mark.parametrize("tokens", [3, 9, 49])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_of_any_shape(backend, shape, tokens, dtype):
    codes, bank, x, _ = problem(tokens, n=1, shape=shape, dtype=dtype)
    codes += np.float32(0.1)
    found = compose_matmul(codes, bank, x, dtype=np.float32, backend=backend)
    expected = exact(codes, bank, x, np.zeros(tokens, int))
    assert found.shape == (tokens, shape[0])
    np.testing.assert_allclose(found, expected, atol=(3e-2 if dtype == BF16 and tokens > 8 else 1e-4) * shape[1] ** 0.5)


def test_is_the_product_with_what_compose_makes(backend):
    codes, bank, x, rows = problem(tokens=30)
    mixtures = compose(codes, bank, backend="reference").astype(np.float64)
    found = compose_matmul(scipy.sparse.csr_array(codes), bank, x, rows=rows, backend=backend)
    assert relative(found, np.einsum("trd,td->tr", mixtures[rows], x)) < 1e-6


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    n=st.integers(1, 4),
    m=st.integers(1, 5),
    shape=st.tuples(st.integers(0, 60), st.integers(1, 700)),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_threads_change_no_bit(backend, tokens, n, m, shape, dtype, threads, seed):
    codes, bank, x, rows = problem(tokens, n, m, shape, dtype, seed)
    one = compose_matmul(codes, bank, x, rows=rows, threads=1, backend=backend)
    assert one.shape == (tokens, shape[0]) and one.dtype == dtype
    assert one.tobytes() == compose_matmul(codes, bank, x, rows=rows, threads=threads, backend=backend).tobytes()


def test_a_mixture_of_nothing_is_zero(backend):
    codes, bank, x, _ = problem(tokens=12)
    codes[1] = 0.0
    rows = np.repeat([0, 1], [3, 9])
    found = compose_matmul(codes, bank, x, rows=rows, backend=backend)
    assert found[:3].any() and not found[3:].any()


def test_tokens_keep_their_places(backend):
    codes, bank, x, rows = problem(tokens=64)
    found = compose_matmul(codes, bank, x, rows=rows, backend=backend)
    turned = compose_matmul(codes, bank, x[::-1].copy(), rows=rows[::-1], backend=backend)
    assert np.array_equal(found, turned[::-1])


def test_writes_where_it_is_told(backend):
    codes, bank, x, rows = problem()
    out = np.empty((5, 11), BF16)
    assert compose_matmul(codes, bank, x, rows=rows, out=out, backend=backend) is out
    assert np.array_equal(out, compose_matmul(codes, bank, x, rows=rows, dtype=BF16, backend=backend))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"codes": np.zeros(3)}, "codes"),
        ({"codes": np.full((2, 3), np.nan)}, "codes"),
        ({"codes": scipy.sparse.csc_array(np.zeros((2, 3)))}, "codes"),
        ({"bank": np.zeros((4, 5, 6), np.float32)}, "bank"),
        ({"bank": np.zeros((3, 5, 7), np.float32)}, "bank"),
        ({"bank": np.zeros((3, 30), np.float32)}, "bank"),
        ({"bank": np.zeros((3, 5, 6))}, "bank"),
        ({"bank": np.zeros((6, 5, 3), np.float32).T}, "bank"),
        ({"x": np.zeros(6, np.float32)}, "x"),
        ({"x": np.zeros((2, 6), int)}, "x"),
        ({"rows": [0, 2]}, "rows"),
        ({"rows": [-1, 0]}, "rows"),
        ({"rows": [0]}, "rows"),
        ({"rows": [0.0, 1.0]}, "rows"),
        ({"dtype": np.float64}, "dtype"),
        ({"out": np.zeros((2, 6), np.float32)}, "out"),
        ({"threads": 0}, "threads"),
        ({"backend": "fortran"}, "backend"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {
        "codes": np.zeros((2, 3)),
        "bank": np.zeros((3, 5, 6), np.float32),
        "x": np.zeros((2, 6), np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=f"^{name}: found"):
        compose_matmul(arguments.pop("codes"), arguments.pop("bank"), arguments.pop("x"), **arguments)


def test_the_result_may_not_overlap_an_argument():
    memory = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="^out: found memory shared"):
        compose_matmul(np.ones((1, 1)), np.ones((1, 4, 4), np.float32), memory, out=memory)


@pytest.mark.parametrize(("m", "d"), [(2, 0), (0, 4)])
def test_without_columns_or_atoms_everything_is_zero(backend, m, d):
    bank, x = np.ones((m, 3, d), np.float32), np.ones((2, d), np.float32)
    assert np.array_equal(compose_matmul(np.ones((1, m)), bank, x, backend=backend), np.zeros((2, 3)))
