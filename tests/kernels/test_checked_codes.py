"""Sparse codes are checked before anything follows their indices: one check for all backends."""

import numpy as np
import pytest
import scipy.sparse

from globe.kernels import compose, compose_bank_gradient, compose_code_gradient

BANK = np.arange(15, dtype=np.float32).reshape(3, 5)
GRADIENT = np.arange(10, dtype=np.float32).reshape(2, 5)
CALLS = {
    "compose": lambda codes, backend: compose(codes, BANK, backend=backend),
    "bank gradient": lambda codes, backend: compose_bank_gradient(codes, GRADIENT, backend=backend),
    "code gradient": lambda codes, backend: compose_code_gradient(codes, GRADIENT, BANK, backend=backend),
}


def sparse():
    return scipy.sparse.csr_array(np.array([[1.0, 0, 2], [0, 0.5, 0]]))


def changed(**fields):
    codes = sparse()
    for name, value in fields.items():
        setattr(codes, name, value)
    return codes


BROKEN = {
    "a column of 2e9, as the constructor takes it": (
        lambda: scipy.sparse.csr_array(([1.0], [2_000_000_000], [0, 1, 1]), shape=(2, 3)),
        "column 2000000000 in row 0",
    ),
    "a column past the end": (lambda: changed(indices=np.array([0, 2, 3], np.int32)), "column 3 in row 1"),
    "a negative column": (lambda: changed(indices=np.array([0, -1, 1], np.int32)), "column -1 in row 0"),
    "a column above 2**32": (lambda: changed(indices=np.array([0, 2, 2**32 + 1])), "column 4294967297 in row 1"),
    "unsigned columns": (
        lambda: changed(indices=np.array([0, 2, 2**64 - 1], np.uint64)),
        "column 1844674407370955161",
    ),
    "a falling indptr": (lambda: changed(indptr=np.array([0, 4, 3], np.int32)), "indptr that falls at row 1"),
    "a negative offset": (lambda: changed(indptr=np.array([0, -5, 3], np.int32)), "indptr that falls at row 0"),
    "an indptr that ends early": (lambda: changed(indptr=np.array([0, 1, 2], np.int32)), "indptr ends at 2"),
    "an indptr that ends late": (lambda: changed(indptr=np.array([0, 2, 9], np.int32)), "indptr ends at 9"),
    "an indptr that begins late": (lambda: changed(indptr=np.array([1, 2, 3], np.int32)), "indptr that begins at 1"),
    "an indptr that is too short": (lambda: changed(indptr=np.array([0, 3], np.int32)), "2 offsets in indptr"),
    "no indptr": (lambda: changed(indptr=np.zeros(0, np.int32)), "0 offsets in indptr"),
    "fewer values than columns": (lambda: changed(data=np.ones(2)), "3 columns and 2 values"),
    "columns of floats": (lambda: changed(indices=np.array([0.0, 2.0, 1.0])), "indices of float64"),
    "columns in two axes": (lambda: changed(indices=np.array([[0, 2, 1]])), "indices of ndarray"),
    "complex values": (lambda: sparse().astype(np.complex128), "complex128"),
    "objects": (lambda: changed(data=np.array([1, 2, 3], object)), "object"),
    "masked values": (lambda: changed(data=np.ma.masked_equal([1.0, 2.0, 3.0], 2)), "data of MaskedArray"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_structure_is_refused(backend, case, call):
    make, found = BROKEN[case]
    with pytest.raises(ValueError, match=f"^codes: found .*{found}"):
        CALLS[call](make(), backend)


@pytest.mark.parametrize("call", ["compose", "bank gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_array])
def test_values_beyond_float32_are_refused(backend, call, value, form):
    codes = sparse().toarray()
    codes[1, 1] = value
    with pytest.raises(ValueError, match="^codes: found .*range of float32"):
        CALLS[call](form(codes), backend)


def test_only_places_count_in_the_code_gradient(backend):
    codes = sparse()
    codes.data[:] = [np.nan, np.inf, 1e39]
    found = compose_code_gradient(codes, GRADIENT, BANK, backend=backend)
    assert found.toarray().tolist() == [[30.0, 0.0, 130.0], [0.0, 255.0, 0.0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_indices_of_any_integers(backend, dtype):
    codes = changed(indices=np.array([0, 2, 1], dtype), indptr=np.array([0, 2, 3], dtype))
    for call in CALLS.values():
        found, expected = call(codes, backend), call(sparse(), backend)
        assert np.array_equal(getattr(found, "data", found), getattr(expected, "data", expected))


def test_the_code_gradient_has_memory_of_its_own(backend):
    codes = sparse()
    found = compose_code_gradient(codes, GRADIENT, BANK, backend=backend)
    before = found.toarray()
    codes.indices[:], codes.indptr[:] = [2, 1, 0], [0, 1, 3]
    assert np.array_equal(found.toarray(), before)
    for name in ("data", "indices", "indptr"):
        assert not np.may_share_memory(getattr(found, name), getattr(codes, name))
