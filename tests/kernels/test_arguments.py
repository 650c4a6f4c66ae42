"""What kernels take and refuse, alike in every kernel and backend."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from globe.kernels import (
    compose,
    compose_bank_gradient,
    compose_code_gradient,
    entmax,
    entmax_backward,
    entmax_inverse,
    gram,
    nnls,
    set_num_threads,
)
from globe.kernels.backends import check_threads
from globe.machine.processors import affinity

EYE = np.eye(2, dtype=np.float32)
CALLS = {  # every array argument of every kernel
    "compose codes": ("codes", lambda x, **more: compose(x, EYE, **more)),
    "compose bank": ("bank", lambda x, **more: compose(EYE, x, **more)),
    "bank gradient codes": ("codes", lambda x, **more: compose_bank_gradient(x, EYE, **more)),
    "bank gradient": ("gradient", lambda x, **more: compose_bank_gradient(EYE, x, **more)),
    "code gradient codes": ("codes", lambda x, **more: compose_code_gradient(x, EYE, EYE, **more).toarray()),
    "code gradient": ("gradient", lambda x, **more: compose_code_gradient(EYE, x, EYE, **more).toarray()),
    "code gradient bank": ("bank", lambda x, **more: compose_code_gradient(EYE, EYE, x, **more).toarray()),
    "entmax": ("logits", lambda x, **more: entmax(x, **more)),
    "entmax backward": ("probabilities", lambda x, **more: entmax_backward(x, EYE, **more)),
    "entmax backward gradient": ("gradient", lambda x, **more: entmax_backward(EYE, x, **more)),
    "gram": ("vectors", lambda x, **more: gram(x, **more)),
    "nnls gram": ("gram", lambda x, **more: nnls(x, EYE, **more).codes),
    "nnls correlations": ("correlations", lambda x, **more: nnls(EYE, x, **more).codes),
}
REFUSED = {
    "text": np.array([["1", "2"], ["3", "4"]]),
    "bytes": np.array([[b"1", b"2"], [b"3", b"4"]]),
    "dates": np.array([[1, 2], [3, 4]], "M8[s]"),
    "durations": np.array([[1, 2], [3, 4]], "m8[s]"),
    "objects": np.array([[1, 2], [3, 4]], object),
    "complex": np.eye(2, dtype=complex),
    "records": np.zeros((2, 2), [("a", "f4")]),
    "masked": np.ma.masked_equal(np.eye(2, dtype=np.float32), 0),
    "ragged": [[1.0], [1.0, 2.0]],
    "nothing": None,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("call", CALLS)
def test_only_arrays_of_real_numbers(backend, call, kind):
    name, function = CALLS[call]
    with pytest.raises(ValueError, match=f"^{name}: found"):
        function(REFUSED[kind], backend=backend)


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_warm_starts_and_probabilities_too(kind):
    for name, call in {
        "weights": lambda x: gram(EYE, weights=x),
        "warm_start": lambda x: nnls(EYE, EYE, warm_start=x),
        "probabilities": entmax_inverse,
    }.items():
        if kind == "nothing" and name != "probabilities":
            continue
        with pytest.raises(ValueError, match=f"^{name}: found"):
            call(REFUSED[kind])


@pytest.mark.parametrize("call", CALLS)
def test_subclasses_are_the_arrays_they_are(backend, call, tmp_path):
    _, function = CALLS[call]
    values = np.array([[0.75, 0.25], [0.25, 0.75]], np.float32)
    expected = function(values, backend=backend)
    values.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(2, 2))
    for value in (values.view(np.matrix), mapped, values.view(type("Own", (np.ndarray,), {}))):
        found = function(value, backend=backend)
        assert type(found) is np.ndarray
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_wide_matrix_has_rows_in_gram(backend, dtype):
    x = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32)
    plain = x.astype(dtype)
    weights = np.linspace(0, 1, 5000)
    for weight in (None, weights):
        assert np.array_equal(
            gram(plain.view(np.matrix), weights=weight, backend=backend), gram(plain, weights=weight, backend=backend)
        )


def test_results_go_to_a_subclass(backend):
    values = np.array([[0.75, 0.25], [0.25, 0.75]], np.float32)
    out = np.zeros((2, 2), np.float32).view(np.matrix)
    for call in (lambda **more: entmax(values, **more), lambda **more: compose(EYE, values, **more)):
        assert call(out=out, backend=backend) is out
        assert np.array_equal(np.asarray(out), call(backend=backend))
        for wrong in (np.ma.zeros((2, 2), np.float32), [[0.0, 0.0], [0.0, 0.0]]):
            with pytest.raises(ValueError, match="^out: found"):
                call(out=wrong, backend=backend)


INTEGERS = [True, False, np.True_, 0, -1, -(2**70), 2**70, 2.0, "2", [2]]


@pytest.mark.parametrize("value", [*INTEGERS, 2**40])
@pytest.mark.parametrize(
    "call",
    [
        lambda threads: compose(EYE, EYE, threads=threads),
        lambda threads: compose_bank_gradient(EYE, EYE, threads=threads),
        lambda threads: compose_code_gradient(EYE, EYE, EYE, threads=threads),
        lambda threads: entmax(EYE, threads=threads),
        lambda threads: entmax_backward(EYE, EYE, threads=threads),
        lambda threads: gram(EYE, threads=threads),
        lambda threads: nnls(EYE, EYE, threads=threads),
        set_num_threads,
    ],
)
def test_threads_are_a_number_of_threads(call, value):
    with pytest.raises(ValueError, match="^threads: found"):
        call(value)


@pytest.mark.parametrize("name", ["max_iterations", "max_support"])
@pytest.mark.parametrize("value", INTEGERS)
def test_limits_are_counts(backend, name, value):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        nnls(EYE, EYE, backend=backend, **{name: value})


@pytest.mark.parametrize("value", [True, "0.5", b"0.5", None, 0.5j, [0.5, 0.5], np.datetime64(1, "s"), 10**400])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("alpha", lambda value: entmax(EYE, value)),
        ("temperature", lambda value: entmax(EYE, temperature=value)),
        ("epsilon", lambda value: entmax(EYE, epsilon=value)),
        ("alpha", lambda value: entmax_backward(EYE, EYE, value)),
        ("temperature", lambda value: entmax_inverse(EYE, temperature=value)),
        ("epsilon", lambda value: compose(EYE, EYE, epsilon=value)),
        ("l1", lambda value: nnls(EYE, EYE, l1=value)),
        ("tolerance", lambda value: nnls(EYE, EYE, tolerance=value)),
    ],
)
def test_options_are_real_numbers(name, call, value):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        call(value)


def test_options_may_be_numbers_of_numpy(backend):
    expected = entmax(EYE, 1.5, temperature=2.0, epsilon=0.125, backend=backend)
    found = entmax(EYE, np.float32(1.5), temperature=np.int8(2), epsilon=np.array(0.125), backend=backend)
    assert np.array_equal(found, expected)


def test_no_more_threads_than_processors():
    assert check_threads(3000) == affinity() == check_threads(None)
    assert check_threads(1) == 1


COUNT = """
import os, sys
import numpy as np
from globe import _native
from globe.kernels import entmax, gram
x = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
one = gram(x, threads=1), entmax(x, threads=1)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
many = gram(x, threads=3000), entmax(x, threads=3000)
lower = np.zeros((4000, 4000))
_native.gram_add(x, "float32", lower, None, 3000)  # past the check in Python
assert np.array_equal(one[0], many[0]) and np.array_equal(one[1], many[1])
assert threads() - before < len(os.sched_getaffinity(0)), (before, threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_thousands_of_threads_do_not_stay():
    subprocess.run([sys.executable, "-c", COUNT], check=True)
