import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.kernels import GramAccumulator, gram

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k"), [(7, 1000), (100, 2051), (33, 1)])
def test_matches_float64(backend, dtype, weighted, n, k):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((n, k)) + 0.3).astype(dtype)
    w = rng.uniform(0, 2, k) if weighted else None
    exact = x.astype(np.float64)
    expected = (exact * (1.0 if w is None else w)) @ exact.T
    result = gram(x, weights=w, backend=backend)
    assert result.dtype == np.float64 and np.array_equal(result, result.T)
    assert relative_error(result, expected) <= 1e-6


@PROPERTY
@given(
    n=st.integers(1, 80),
    k=st.integers(0, 200),
    seed=st.integers(0, 99),
    threads=st.integers(2, 5),
    dtype=st.integers(0, 2),
)
def test_symmetric_semidefinite_and_the_same_on_any_threads(backend, n, k, seed, threads, dtype):
    x = np.random.default_rng(seed).standard_normal((n, k)).astype(DTYPES[dtype])
    g = gram(x, backend=backend, threads=1)
    assert np.array_equal(g, g.T)
    assert np.linalg.eigvalsh(g).min() >= -1e-5 * (1 + np.abs(g).max())
    assert g.tobytes() == gram(x, backend=backend, threads=threads).tobytes()


@PROPERTY
@given(cuts=st.lists(st.integers(0, 3000), max_size=4), seed=st.integers(0, 9))
def test_blocks_of_any_sizes_in_any_order(backend, cuts, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 3000)).astype(ml_dtypes.bfloat16)
    blocks = np.split(x, sorted(cuts), axis=1)
    one, other = GramAccumulator(20), GramAccumulator(20)
    for block in rng.permutation(np.arange(len(blocks))):
        (one if block % 2 else other).add(blocks[block], backend=backend)  # slices: rows a stride apart
    one.merge(GramAccumulator.from_bytes(other.to_bytes()))
    assert one.columns == 3000
    assert relative_error(one.matrix, gram(x, backend="reference")) <= 1e-6


def test_long_sums_keep_their_accuracy(backend):
    x = np.ones((1, 1 << 18), np.float32) * np.float32(0.1)
    assert gram(x, backend=backend)[0, 0] == pytest.approx((1 << 18) * float(np.float32(0.1)) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    "change", [lambda x: x[::2], lambda x: x[::-1], lambda x: x[:, ::3], lambda x: x.T, lambda x: x[:, 5:9]]
)
def test_strided_views(backend, change):
    x = change(np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32))
    np.testing.assert_allclose(gram(x, backend=backend), x @ x.T, rtol=0, atol=1e-4)


def test_memory_maps_are_read(backend, tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(5, 64))
    assert np.array_equal(gram(mapped, backend=backend), gram(x, backend=backend))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [9, 3000])
def test_subnormal_numbers_count(backend, dtype, k):
    x = np.random.default_rng(0).standard_normal((70, k)).astype(dtype)
    x[0], x[1] = 1e-39, 1e16
    x[:2, 2048:] = 0.0  # blocks with and without
    exact = x.astype(np.float64)
    found = gram(x, backend=backend, threads=1)
    np.testing.assert_allclose(found[0], exact[0] @ exact.T, rtol=1e-5, atol=1e-38)
    assert found.tobytes() == gram(x, backend=backend, threads=5).tobytes()


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_weights_are_numbers_of_float32(backend, dtype):
    x = np.ones((2, 3), dtype)
    for weight in (1e39, 3.4028236e38):
        with pytest.raises(ValueError, match="^weights: found .*range of float32"):
            gram(x, weights=[1, 2, weight], backend=backend)
    assert np.array_equal(gram(x * 0, weights=[1, 2, 3.4028234e38], backend=backend), np.zeros((2, 2)))
    assert np.array_equal(gram(x, weights=[1e-50, 0, 0], backend=backend), np.zeros((2, 2)))
    assert gram(x.astype(np.float64), weights=[1, 2, 1e39], backend=backend)[0, 1] == pytest.approx(1e39)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinity_shows(backend):
    x = np.ones((3, 50), ml_dtypes.bfloat16)
    x[1, 7] = np.inf
    g = gram(x, backend=backend)
    assert np.isinf(g[1]).all() and g[0, 2] == 50


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"vectors": np.zeros(3, np.float32)}, "vectors"),
        ({"vectors": np.zeros((2, 3), np.int32)}, "vectors"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2, -1]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "weights": [1, 2, np.nan]}, "weights"),
        ({"vectors": np.zeros((2, 3), np.float32), "threads": 0}, "threads"),
        ({"vectors": np.zeros((2, 3), np.float32), "backend": "fortran"}, "backend"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        gram(**arguments)


def test_an_accumulator_with_part_of_a_block_is_refused(backend, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    accumulator, block = GramAccumulator(2), np.ones((2, 3), np.float32)
    with monkeypatch.context() as patched:
        name = backend.partition("-")[0]
        if name == "native":
            patched.setattr("globe._native.gram_add", interrupt)
        else:
            patched.setattr(f"globe.kernels.{name}.gram.add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            accumulator.add(block, backend=backend)
    for use in (
        lambda: accumulator.add(block, backend=backend),
        lambda: accumulator.matrix,
        accumulator.to_bytes,
        lambda: accumulator.merge(GramAccumulator(2)),
        lambda: GramAccumulator(2).merge(accumulator),
    ):
        with pytest.raises(RuntimeError, match="interrupted"):
            use()


def test_accumulators_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="^vectors: found"):
        GramAccumulator(3).add(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="^other: found"):
        GramAccumulator(3).merge(GramAccumulator(2))
    with pytest.raises(ValueError, match="^state: found"):
        GramAccumulator.from_bytes(b"nothing")
    with pytest.raises(ValueError, match="^n: found"):
        GramAccumulator(-1)
