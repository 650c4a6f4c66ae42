"""The C library of the installed package, called from Python: globe.h by ctypes."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import globe

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
NUMPY = {0: np.dtype("float32"), 1: np.dtype("float16"), 2: np.dtype(ml_dtypes.bfloat16)}
FAMILIES = ("gate", "up", "down")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Matrix(Structure):
    """globe_const_matrix and globe_matrix."""

    _fields_ = [("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("stride", c_int64), ("dtype", c_int32)]


class Bank(Structure):
    """globe_bank."""

    _fields_ = [
        ("name", c_char_p),
        ("rank", c_int64),
        ("width", c_int64),
        ("atoms", Matrix),
        ("experts", c_int64),
        ("nonzeros", c_int64),
        ("indptr", POINTER(c_int64)),
        ("indices", POINTER(c_int32)),
        ("values", POINTER(ctypes.c_float)),
    ]


class ExpertMatrix(Structure):
    """globe_expert_matrix."""

    _fields_ = [("stored", Matrix), ("bank", c_int64), ("row", c_int64)]


class Options(Structure):
    """globe_expert_options."""

    _fields_ = [
        ("activation", c_int32),
        ("threads", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("cache", c_void_p),
    ]


class Stats(Structure):
    """globe_cache_stats."""

    _fields_ = [
        *((name, c_int64) for name in ("hits", "misses", "evictions", "entries")),
        ("bytes", c_size_t),
        ("budget", c_size_t),
    ]


class Key(Structure):
    """globe_cache_key."""

    _fields_ = [("checkpoint", c_uint64), ("bank", c_int64), ("row", c_int64)]


def path() -> Path:
    """Where the shared library lies."""
    (found,) = (Path(globe.get_cmake_dir()).parents[1]).glob("libglobe.*[!a]")
    return found


_library = None


def library() -> Any:
    """Load the library, once."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(path()))
        for name in ("globe_version", "globe_last_error", "globe_active_isa"):
            getattr(_library, name).restype = c_char_p
        for name in ("globe_close", "globe_cache_free"):
            getattr(_library, name).argtypes, getattr(_library, name).restype = [c_void_p], None
    return _library


class Refused(Exception):
    """A status other than GLOBE_OK, and the message."""

    def __init__(self, status: int) -> None:
        super().__init__(library().globe_last_error().decode())
        self.status = status


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status."""
    status = getattr(library(), f"globe_{name}")(*arguments)
    if status != 0:
        raise Refused(status)


def seen(array: np.ndarray) -> Matrix:
    """An array of two axes as the library sees it."""
    dtype = next(number for number, known in NUMPY.items() if known == array.dtype)
    return Matrix(array.ctypes.data, *array.shape, array.strides[0] // array.itemsize, dtype)


def array_of(matrix: Matrix) -> np.ndarray:
    """A copy of what the library shows."""
    kind = NUMPY[matrix.dtype]
    raw = ctypes.string_at(matrix.data, matrix.rows * matrix.cols * kind.itemsize)
    return np.frombuffer(raw, kind).reshape(matrix.rows, matrix.cols)


class Cache:
    """A globe_cache."""

    def __init__(self, budget: int, dtype: str = "float32") -> None:
        self.handle = c_void_p()
        call("cache_new", c_size_t(budget), DTYPES[dtype], byref(self.handle))
        weakref.finalize(self, library().globe_cache_free, self.handle)

    def stats(self) -> Stats:
        found = Stats()
        call("cache_stats_of", self.handle, byref(found))
        return found

    def keys(self) -> list[tuple[int, int]]:
        """Bank and row of what is held."""
        count = c_int64()
        call("cache_keys", self.handle, None, c_int64(0), byref(count))
        keys = (Key * count.value)()
        call("cache_keys", self.handle, keys, count, byref(count))
        return [(key.bank, key.row) for key in keys]


class Checkpoint:
    """A globe_checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.handle = c_void_p()
        call("open", str(directory).encode(), byref(self.handle))
        weakref.finalize(self, library().globe_close, self.handle)

    def layers(self) -> list[int]:
        numbers, count = POINTER(c_int64)(), c_int64()
        call("layers", self.handle, byref(numbers), byref(count))
        return numbers[: count.value]

    def experts(self, layer: int) -> int:
        count = c_int64()
        call("experts", self.handle, c_int64(layer), byref(count))
        return count.value

    def banks(self) -> list[Bank]:
        count = c_int64()
        call("bank_count", self.handle, byref(count))
        banks = [Bank() for _ in range(count.value)]
        for number, bank in enumerate(banks):
            call("bank_at", self.handle, c_int64(number), byref(bank))
            bank.checkpoint = self  # which must live as long
        return banks

    def matrix(self, family: str, layer: int, expert: int) -> ExpertMatrix:
        found = ExpertMatrix()
        place = (FAMILIES.index(family), c_int64(layer), c_int64(expert))
        call("expert_matrix_at", self.handle, *place, byref(found))
        return found

    def compose(self, matrix: ExpertMatrix, dtype: str = "float32") -> np.ndarray:
        bank = self.banks()[matrix.bank]
        out = np.empty((bank.rank, bank.width), NUMPY[DTYPES[dtype]])
        call("compose", self.handle, byref(matrix), byref(seen(out)), 1)
        return out

    def touch(self, cache: Cache, matrix: ExpertMatrix) -> None:
        call("cache_touch", cache.handle, self.handle, byref(matrix))

    def forward(
        self,
        place: tuple[int, int],
        tokens: np.ndarray,
        activation: str = "silu",
        cache: Cache | None = None,
        threads: int = 1,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        bytes_needed = c_size_t()
        call("expert_workspace", self.handle, c_int64(len(tokens)), threads, byref(bytes_needed))
        workspace = ctypes.create_string_buffer(bytes_needed.value)
        options = Options(
            ACTIVATIONS.index(activation),
            threads,
            ctypes.addressof(workspace),
            bytes_needed.value,
            None if cache is None else cache.handle,
        )
        out = np.full(tokens.shape, np.nan, dtype)
        where = map(c_int64, place)
        call("expert_forward", self.handle, *where, byref(seen(tokens)), byref(seen(out)), byref(options))
        return out
