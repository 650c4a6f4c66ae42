"""Packed matrices: as compressed-tensors' library packs them, whatever the bits, group and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from globe.checkpoint.formats.packed import (  # noqa: E402
    PACKED_BITS,
    Packing,
    dequantised,
    pack,
    packed,
    read_codes,
    read_packing,
    unpack,
)
from globe.checkpoint.tensorfile import DTYPE_NAMES, read_header  # noqa: E402
from globe.errors import GlobeError  # noqa: E402


def integers(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("columns", [32, 48, 96, 100, 576])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = integers(bits, 5, columns)
    words = pack(codes, bits)
    assert torch.equal(words, helpers.pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, columns), codes)


@given(bits=st.sampled_from(PACKED_BITS), columns=st.integers(1, 200), lead=st.sampled_from([(), (3,), (2, 3)]))
def test_what_is_packed_comes_back(bits: int, columns: int, lead: tuple[int, ...]) -> None:
    codes = integers(bits, *lead, columns)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (*lead, Packing(bits, 1).words(columns))
    assert torch.equal(unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("shape", [(6, 96), (3, 6, 96)])
def test_files_hold_what_is_promised(bits: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    packing, codes = Packing(bits, 48), integers(bits, *shape)
    scales = (torch.rand(*shape[:-1], 2) + 0.1).bfloat16()
    tensors = packed("a.left", codes, scales, bits)
    entries = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    assert entries == packing.entries("a.left", shape)
    assert sum(value.nbytes for value in tensors.values()) == packing.nbytes(shape)
    save_file(tensors, tmp_path / "file.safetensors")
    found, read = read_codes(read_header(tmp_path / "file.safetensors").tensors, "a.left", packing)
    assert torch.equal(found, codes) and torch.equal(read, scales)
    wide = scales.float().repeat_interleave(48, -1)
    assert torch.equal(dequantised(found, read), codes.float() * wide)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantised(found, read, dtype), (codes.float() * wide).to(dtype))


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("a.left_scale", float("nan"), ("a.left_scale", "nan", "[0, 1]")),
        ("a.left_scale", 0.0, ("a.left_scale", "0 at")),
        ("a.left_scale", -float("inf"), ("a.left_scale", "-inf at")),
        ("a.left_shape", 7, ("a.left_shape", "7", "[6, 96]")),
    ],
)
def test_hostile_parts_are_refused(part: str, value: float, words: tuple[str, ...], tmp_path: Path) -> None:
    tensors = packed("a.left", integers(4, 6, 96), torch.ones(6, 2).bfloat16(), 4)
    tensors[part].view(-1)[1] = value
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(GlobeError) as caught:
        read_codes(read_header(tmp_path / "file.safetensors").tensors, "a.left", Packing(4, 48))
    for word in words:
        assert word in str(caught.value)


def test_scales_may_be_negative(tmp_path: Path) -> None:
    codes, scales = integers(4, 6, 96), torch.linspace(-2, -1, 12).view(6, 2).bfloat16()
    save_file(packed("a.left", codes, scales, 4), tmp_path / "file.safetensors")
    found = read_codes(read_header(tmp_path / "file.safetensors").tensors, "a.left", Packing(4, 48))
    expected = codes.float() * scales.float().repeat_interleave(48, 1)
    assert torch.equal(dequantised(*found), expected)


def test_what_a_manifest_says() -> None:
    assert read_packing(None, 96) is None
    assert read_packing({"bits": 4, "group": 32}, 96) == Packing(4, 32)
    for told in ({"bits": 5, "group": 32}, {"bits": 4, "group": 36}, {"bits": 4, "group": 0}, {"bits": 4}, [4, 32],
                 {"bits": True, "group": 32}, {"bits": 4, "group": "32"}):  # fmt: skip
        with pytest.raises(ValueError, match="packed as"):
            read_packing(told, 96)
