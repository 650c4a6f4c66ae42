"""Reading and writing safetensors files piecewise.

The safetensors package maps whole files into memory, and every page read then counts as resident, and it
writes a file only from tensors that are all in memory. Here a slice is read with `pread` and a file is
written tensor by tensor, so the resident memory is that of the tensor in hand. The format is one page:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from globe.errors import GlobeError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Bits of an element of every dtype of the format; those beyond torch's are copied and never computed with.
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype name, shape, first byte in the file, bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class FileHeader:
    """A file's tensors in the order of their bytes, its metadata, and the raw header."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path) -> FileHeader:
    """Read and check the header of a safetensors file.

    Raises
    ------
    GlobeError
        If the file is missing, is not safetensors, holds an unknown dtype, or ends before its tensors do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            raw = file.read(length) if length <= min(_MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise GlobeError(f"{path}: cannot be read ({error.strerror}); fetch the checkpoint's missing shard") from None
    if not raw or len(raw) != length:
        raise GlobeError(f"{path}: not a whole safetensors file (header cut off at {size} bytes); fetch it again")
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {
            name: _entry(path, 8 + length, name, entry)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GlobeError(f"{path}: the safetensors header is not valid; fetch the file again") from None
    end = 8 + length
    for name, info in tensors.items():
        if info.start != end:
            raise GlobeError(f"{path}: tensor {name} starts at byte {info.start}, expected {end}; fetch the file again")
        end += info.nbytes
        if info.dtype not in DTYPE_BITS:
            raise GlobeError(
                f"{path}: tensor {name} has dtype {info.dtype}; expected one of {', '.join(DTYPE_BITS)}: fetch it again"
            )
        if 8 * info.nbytes != math.prod(info.shape) * DTYPE_BITS[info.dtype]:
            raise GlobeError(
                f"{path}: tensor {name} has {info.nbytes} bytes, not what {info.dtype} {list(info.shape)} takes; fetch "
                "the file again"
            )
    if end != size:
        raise GlobeError(f"{path}: {size} bytes found, the header promises {end}; it is truncated, fetch it again")
    return FileHeader(path, tensors, metadata, raw)


def _entry(path: Path, origin: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    """One tensor of a header, whose types JSON does not vouch for."""
    name.encode()  # a lone surrogate could not be written again
    (first, last), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or not type(first) is type(last) is int or not 0 <= first <= last:
        raise ValueError(name)
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(name)
    return TensorInfo(path, dtype, tuple(shape), origin + first, last - first)


_bytes_read = 0
_counting = threading.Lock()


def bytes_read() -> int:
    """Bytes of tensor data that this process has read so far."""
    return _bytes_read


def read_bytes(info: TensorInfo, offset: int, nbytes: int) -> bytearray:
    """Read `nbytes` of a tensor's data from its byte `offset`."""
    data = bytearray(nbytes)
    _read_into(info, offset, memoryview(data))
    return data


def _read_into(info: TensorInfo, offset: int, view: memoryview) -> None:
    global _bytes_read
    done = 0
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start + offset)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise GlobeError(f"{info.file}: ended early while reading; the file changed during the run: start over")
            done += got
    with _counting:
        _bytes_read += done


def read_tensor(
    info: TensorInfo,
    rows: tuple[int, int] | None = None,
    index: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read a tensor, entry `index` of its first axis, or the `rows` (first, past the last) of what that leaves.

    Returns
    -------
    torch.Tensor
        In the file's own dtype, on the CPU; `out`, contiguous and of that shape and dtype, where it is given.

    Raises
    ------
    GlobeError
        If the dtype is one that torch does not have, or the file ended early.
    """
    if info.dtype not in TORCH_DTYPES:
        raise GlobeError(
            f"{info.file}: a tensor of dtype {info.dtype} can be copied, not computed with: dequantise first"
        )
    dtype = TORCH_DTYPES[info.dtype]
    shape, offset = info.shape, 0
    if index is not None:
        shape = shape[1:]
        offset = index * math.prod(shape) * dtype.itemsize
    if rows is not None:
        row = math.prod(shape[1:]) * dtype.itemsize
        offset += rows[0] * row
        shape = (rows[1] - rows[0], *shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    if out.numel() > 0:
        _read_into(info, offset, out.view(-1).view(torch.uint8).numpy().data)
    return out


class TensorWriter:
    """Write one safetensors file tensor by tensor; it bears its final name only once whole.

    Parameters
    ----------
    path : Path
        The file's final name.
    entries : mapping of str to (dtype name, shape)
        All tensors, in the order in which they will be written.
    metadata : mapping of str to str
        The header's metadata.

    `sha256` is that of the whole file, once it is written.
    """

    sha256: str = ""

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._pending = [(name, tensor_bytes(*entry)) for name, entry in entries.items()]
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for (name, nbytes), (dtype, shape) in zip(self._pending, entries.values(), strict=True):
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._temporary = path.with_name(f".{path.name}.partial")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="globe-hash")
        self._file = self._temporary.open("wb")
        self._put(struct.pack("<Q", len(raw)) + raw)

    def _put(self, chunk: bytes | bytearray | memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, chunk)
        self._file.write(chunk)
        hashed.result()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        self.write_parts(name, [tensor])

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write the next tensor from parts of it along its first axis."""
        self.write_chunks(name, (_raw(part) for part in parts))

    def write_chunks(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the next tensor from pieces of its bytes."""
        expected, nbytes = self._pending.pop(0)
        assert name == expected, f"{name} written where {expected} was announced"
        written = 0
        for chunk in chunks:
            self._put(chunk)
            written += len(chunk)
        assert written == nbytes, f"{name}: {written} bytes written, {nbytes} announced"

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        if error is None:
            assert not self._pending, f"{self._pending[0][0]} was announced and not written"
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            self.sha256 = self._digest.hexdigest()
        else:
            with suppress(OSError):  # closing writes what is buffered, and a full disk is full still
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _raw(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def copy_chunks(info: TensorInfo, size: int = 1 << 24) -> Iterable[bytearray]:
    """A tensor's bytes in pieces of at most `size`."""
    for offset in range(0, info.nbytes, size):
        yield read_bytes(info, offset, min(size, info.nbytes - offset))


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
