import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.kernels import qmatmul

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


def pack(q, bits):
    """Pack integers as compressed-tensors' pack_to_int32 does."""
    unsigned = (q + (1 << bits - 1)).astype(np.uint32).reshape(len(q), q.shape[1] * bits // 32, 32 // bits)
    return np.bitwise_or.reduce(unsigned << np.arange(0, 32, bits, dtype=np.uint32), axis=2).view(np.int32)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits):
    torch = pytest.importorskip("torch")
    packed_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = np.random.default_rng(0).integers(-(1 << bits - 1), 1 << bits - 1, (3, 64), np.int8)
    theirs = packed_quantized.pack_to_int32(torch.from_numpy(q), bits).numpy()
    assert np.array_equal(pack(q.astype(np.int64), bits), theirs)


def problem(n=5, p=37, groups=3, group=32, bits=4, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.integers(-(1 << bits - 1), 1 << bits - 1, (p, groups * group))
    scales = rng.uniform(0.5, 2.0, (p, groups)).astype(dtype)
    x = rng.standard_normal((n, groups * group)).astype(dtype)
    return x, pack(q, bits), scales, q * np.repeat(scales.astype(np.float64), group, axis=1)


def relative(found, exact):
    return np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [8, 32, 40, 64, 128, 256])
def test_matches_the_dequantised_product(backend, bits, dtype, group):
    for n in (1, 3, 13):
        x, packed, scales, weights = problem(n=n, group=group, bits=bits, dtype=dtype)
        exact = x.astype(np.float64) @ weights.T
        assert relative(qmatmul(x, packed, scales, dtype=np.float32, backend=backend), exact) < 1e-4
        rounded = qmatmul(x, packed, scales, backend=backend)
        assert rounded.dtype == dtype and relative(rounded, exact) < 1e-4 + float(ml_dtypes.finfo(dtype).eps) / 2


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_multiplied_without_error(backend, bits):
    rng = np.random.default_rng(1)
    q = rng.integers(-(1 << bits - 1), 1 << bits - 1, (19, 256))
    q[0], q[1] = (1 << bits - 1) - 1, -(1 << bits - 1)  # the largest sums that there are
    x = rng.integers(-32767, 32768, (7, 256))
    x[0], x[1] = 32767, -32768
    found = qmatmul(x.astype(np.float32), pack(q, bits), np.ones((19, 1), np.float32), backend=backend)
    assert np.array_equal(found, (x @ q.T).astype(np.float32))


def test_bfloat16_near_the_largest_is_exact(backend):
    x, packed, scales, weights = problem(dtype=BF16, group=64)
    x = (np.sign(x.astype(np.float32)) * np.clip(np.abs(x.astype(np.float32)), 2**-5, 3.99)).astype(BF16)
    found = qmatmul(x, packed, scales, dtype=np.float32, backend=backend)
    np.testing.assert_allclose(found, x.astype(np.float64) @ weights.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_backends_agree(backend, bits):
    x, packed, scales, _ = problem(n=9, p=70, groups=11, bits=bits)
    x *= np.logspace(-30, 3, x.shape[1], dtype=np.float32)
    expected = qmatmul(x, packed, scales, backend="reference")
    found = qmatmul(x, packed, scales, backend=backend)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 30),
    p=st.integers(0, 70),
    groups=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_neither_threads_nor_other_tokens_change_a_bit(backend, n, p, groups, bits, dtype, threads, seed):
    x, packed, scales, _ = problem(n, p, groups, 32, bits, dtype, seed)
    one = qmatmul(x, packed, scales, threads=1, backend=backend)
    assert one.shape == (n, p)
    assert one.tobytes() == qmatmul(x, packed, scales, threads=threads, backend=backend).tobytes()
    for t in range(0, n, 7):
        alone = qmatmul(x[t : t + 1], packed, scales, threads=1, backend=backend)
        assert alone.tobytes() == one[t : t + 1].tobytes()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_gives_nan(backend, value, dtype):
    x, packed, scales, weights = problem(dtype=dtype)
    x[2, 50] = value
    found = qmatmul(x, packed, scales, dtype=np.float32, backend=backend)
    assert np.isnan(found[2]).all()
    others = [0, 1, 3, 4]
    assert relative(found[others], x[others].astype(np.float64) @ weights.T) < 1e-4


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e30])
def test_of_any_size(backend, size):
    x, packed, scales, weights = problem()
    x *= np.float32(size)
    found = qmatmul(x, packed, scales, backend=backend)
    np.testing.assert_allclose(found, x.astype(np.float64) @ weights.T, rtol=1e-2, atol=1e-3 * size + 1e-33)


def test_tokens_by_the_block(backend):
    x, packed, scales, weights = problem(n=1100, p=3)
    found = qmatmul(x, packed, scales, backend=backend)
    assert relative(found, x.astype(np.float64) @ weights.T) < 1e-4


def test_writes_where_it_is_told(backend):
    x, packed, scales, _ = problem()
    out = np.empty((5, 37), BF16)
    assert qmatmul(x, packed, scales, dtype=BF16, out=out, backend=backend) is out
    assert np.array_equal(out, qmatmul(x, packed, scales, dtype=BF16, backend=backend))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": np.zeros(96, np.float32)}, "x"),
        ({"x": np.zeros((2, 96))}, "x"),
        ({"x": np.zeros((96, 2), np.float32).T}, "x"),
        ({"x": np.zeros((2, 95), np.float32)}, "packed"),
        ({"packed": np.zeros((4, 12), np.int64)}, "packed"),
        ({"packed": np.zeros((4, 12), np.float32)}, "packed"),
        ({"packed": np.zeros((12, 4), np.int32).T}, "packed"),
        ({"packed": np.zeros((4, 13), np.int32)}, "packed"),
        ({"packed": np.zeros(48, np.int32)}, "packed"),
        ({"scales": np.zeros((5, 3), np.float32)}, "scales"),
        ({"scales": np.zeros((4, 5), np.float32)}, "scales"),
        ({"scales": np.zeros((4, 24), np.float32)}, "scales"),
        ({"scales": np.zeros((4, 0), np.float32)}, "scales"),
        ({"scales": np.zeros((4, 3))}, "scales"),
        ({"dtype": np.float64}, "dtype"),
        ({"dtype": "one"}, "dtype"),
        ({"out": np.zeros((2, 3), np.float32)}, "out"),
        ({"threads": 0}, "threads"),
        ({"backend": "fortran"}, "backend"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = {
        "x": np.zeros((2, 96), np.float32),
        "packed": np.zeros((4, 12), np.int32),
        "scales": np.ones((4, 3), np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=f"^{name}: found"):
        qmatmul(arguments.pop("x"), arguments.pop("packed"), arguments.pop("scales"), **arguments)


def test_a_group_too_long_is_refused():
    with pytest.raises(ValueError, match="^scales: found 1 groups for 512 columns"):
        qmatmul(np.zeros((1, 512), np.float32), np.zeros((2, 64), np.int32), np.ones((2, 1), np.float32))


def test_the_result_may_not_overlap_an_argument():
    memory = np.zeros((32, 32), np.float32)
    with pytest.raises(ValueError, match="^out: found memory shared"):
        qmatmul(memory, np.zeros((32, 4), np.int32), np.ones((32, 1), np.float32), out=memory)


def test_without_columns_everything_is_zero(backend):
    x, packed, scales = np.zeros((2, 0), np.float32), np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32)
    assert np.array_equal(qmatmul(x, packed, scales, backend=backend), np.zeros((2, 3)))
