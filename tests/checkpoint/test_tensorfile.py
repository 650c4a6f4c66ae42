"""Our safetensors reader and writer against the safetensors library, both ways."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from globe.checkpoint.tensorfile import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    TensorWriter,
    copy_chunks,
    read_bytes,
    read_header,
    read_tensor,
    write_text,
)
from globe.errors import GlobeError

Tensors = dict[str, torch.Tensor]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every bit at random (booleans are 0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, found.shape, bits(found)) == (wanted.dtype, wanted.shape, bits(wanted))


@st.composite
def tensor_files(draw: st.DrawFn) -> Tensors:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), max_size=5, unique=True))
    names = [name for name in names if name != "__metadata__"]
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    dtypes = st.sampled_from(list(TORCH_DTYPES.values()))
    return {name: random_tensor(draw(dtypes), draw(shapes), seed) for seed, name in enumerate(names)}


metadata = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), st.text(max_size=9), max_size=3)


@given(tensors=tensor_files(), metadata=metadata)
def test_what_we_write_the_library_reads(
    tensors: Tensors, metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    entries = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(path, entries, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    header = read_header(path)
    assert list(header.tensors) == list(tensors)
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


@given(tensors=tensor_files(), metadata=metadata, data=st.data())
def test_what_the_library_writes_we_read(
    tensors: Tensors, metadata: dict[str, str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    header = read_header(path)
    assert header.metadata == metadata
    assert set(header.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.dtype == DTYPE_NAMES[tensor.dtype]
        assert info.nbytes == tensor.nbytes
        assert_same(read_tensor(info), tensor)
        if tensor.ndim:
            first = data.draw(st.integers(0, len(tensor)))
            last = data.draw(st.integers(first, len(tensor)))
            assert_same(read_tensor(info, rows=(first, last)), tensor[first:last])
        if tensor.ndim > 1 and len(tensor):
            index = data.draw(st.integers(0, len(tensor) - 1))
            assert_same(read_tensor(info, index=index), tensor[index])
            last = data.draw(st.integers(0, tensor.shape[1]))
            assert_same(read_tensor(info, rows=(0, last), index=index), tensor[index, :last])
        chunks = [bytes(chunk) for chunk in copy_chunks(info, data.draw(st.integers(1, 9)))]
        assert list(b"".join(chunks)) == bits(tensor)


def write_two(path: Path) -> None:
    with TensorWriter(path, {"a": ("F32", (2, 3)), "b": ("I16", (3,))}, {"format": "pt"}) as writer:
        writer.write("a", torch.arange(6.0).view(2, 3))
        writer.write_chunks("b", [b"\x01\x00\x02", b"", bytearray(b"\x00\x03\x00")])


def test_the_exact_bytes_of_a_file(tmp_path: Path) -> None:
    write_two(tmp_path / "two.safetensors")
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"I16","shape":[3],"data_offsets":[24,30]}}'
    )
    header += b" " * (-len(header) % 8)
    data = struct.pack("<6f3h", 0, 1, 2, 3, 4, 5, 1, 2, 3)
    assert (tmp_path / "two.safetensors").read_bytes() == struct.pack("<Q", len(header)) + header + data


def test_strided_tensors_are_written_in_their_own_order(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    with TensorWriter(tmp_path / "t", {"t": ("F32", (6, 4)), "s": ("F32", (2, 3))}) as writer:
        writer.write("t", base.T)
        writer.write("s", base[::2, 1::2])
    found = load_file(tmp_path / "t")
    assert torch.equal(found["t"], base.T) and torch.equal(found["s"], base[::2, 1::2])


def test_a_file_bears_its_name_only_once_whole(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    with pytest.raises(RuntimeError, match="stopped"), TensorWriter(path, {"a": ("F32", (1,))}) as writer:
        writer.write("a", torch.ones(1))
        assert not path.exists()
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "steps",
    [[("b", 6)], [("a", 23)], [("a", 25)], [("a", 24)], [("a", 24), ("a", 24)]],
    ids=["order", "short", "long", "missing", "twice"],
)
def test_what_is_written_must_be_what_was_announced(steps: list[tuple[str, int]], tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    entries = {"a": ("F32", (2, 3)), "b": ("I16", (3,))}
    with pytest.raises(AssertionError, match="announced"), TensorWriter(path, entries) as writer:
        for name, nbytes in steps:
            writer.write_chunks(name, [bytes(nbytes)])
    assert not path.exists()


@given(cut=st.integers(0, 10**6))
def test_a_truncated_file_is_refused_wherever_it_ends(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    write_two(path)
    content = path.read_bytes()
    path.write_bytes(content[: cut % len(content)])
    with pytest.raises(GlobeError, match="fetch it again|header is not valid"):
        read_header(path)


@pytest.mark.parametrize("extra", [b"\x00", b"x" * 100])
def test_bytes_past_the_last_tensor_are_refused(extra: bytes, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    write_two(path)
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(GlobeError, match="the header promises"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    write_two(path)
    info = read_header(path).tensors["b"]
    path.write_bytes(path.read_bytes()[:-1])
    assert read_bytes(info, 0, 4) == b"\x01\x00\x02\x00"
    with pytest.raises(GlobeError, match="ended early"):
        read_bytes(info, 0, 6)


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old", encoding="utf-8")
    write_text(path, json.dumps({"name": "é"}, ensure_ascii=False))
    assert path.read_bytes() == '{"name": "é"}'.encode()
    assert list(tmp_path.iterdir()) == [path]
