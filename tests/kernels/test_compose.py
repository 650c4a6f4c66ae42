import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from globe.kernels import compose

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


def problem(n=6, m=9, shape=(5, 300), dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((n, m)) * (rng.random((n, m)) < 0.4)
    return codes.astype(np.float32), rng.standard_normal((m, *shape)).astype(dtype)


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("sparse", [None, scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_matches_dense(bank_dtype, out_dtype, sparse):
    codes, bank = problem(dtype=bank_dtype)
    result = compose(codes if sparse is None else sparse(codes), bank, dtype=out_dtype)
    assert result.dtype == (out_dtype or bank_dtype)
    expected = np.einsum("nm,mab->nab", codes.astype(np.float64), bank.astype(np.float64))
    step = float(ml_dtypes.finfo(result.dtype).eps)
    np.testing.assert_allclose(result.astype(np.float64), expected, rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounds_as_numpy_does(dtype):
    codes, bank = problem(shape=(4000,))
    bank *= np.logspace(-8, 4, 4000, dtype=np.float32)
    full = compose(codes, bank)
    with np.errstate(over="ignore"):
        expected = full.astype(dtype)
    assert np.array_equal(compose(codes, bank, dtype=dtype).view(np.uint16), expected.view(np.uint16))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 8),
    m=st.integers(1, 8),
    width=st.integers(0, 3000),
    threads=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_threads_change_no_bit(n, m, width, threads, dtype, seed):
    codes, bank = problem(n, m, (width,), dtype, seed)
    one = compose(codes, bank, threads=1)
    assert one.shape == (n, width)
    assert one.tobytes() == compose(codes, bank, threads=threads).tobytes() == compose(codes, bank).tobytes()


def test_epsilon_skips_small_codes():
    codes, bank = problem()
    pruned = np.where(np.abs(codes) < 0.5, 0, codes)
    assert np.array_equal(compose(codes, bank, epsilon=0.5), compose(pruned, bank))


def test_duplicate_entries_add_up():
    codes = scipy.sparse.csr_array((np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 2])), shape=(1, 2))
    assert compose(codes, np.ones((2, 3), np.float32)).tolist() == [[3, 3, 3]]


def test_infinities_and_nans_pass_through():
    bank = np.array([[np.inf, np.nan, -np.inf, 1.0]], BF16)
    result = compose(np.ones((1, 1)), bank).astype(np.float32)
    np.testing.assert_array_equal(result, [[np.inf, np.nan, -np.inf, 1.0]])


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
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {"codes": np.zeros((2, 3)), "bank": np.zeros((3, 5), np.float32), **change}
    with pytest.raises(ValueError, match=f"^{name}: found"):
        compose(arguments.pop("codes"), arguments.pop("bank"), **arguments)


def test_column_outside_the_bank_is_caught():
    codes = scipy.sparse.csr_array(np.eye(2, dtype=np.float32))
    codes.indices[1] = 7
    with pytest.raises(ValueError, match="^codes: found column 7"):
        compose(codes, np.ones((2, 3), np.float32))
