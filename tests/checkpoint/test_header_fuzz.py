"""Safetensors headers with random damage: one kind of error, little memory, and never more lenient than the library."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import SafetensorError, deserialize  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorWriter, read_header, read_tensor  # noqa: E402
from globe.choice.inspect import inspect  # noqa: E402
from globe.errors import GlobeError  # noqa: E402

Damage = Callable[[bytearray, int, random.Random], None]


def flip_bits(content: bytearray, end: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)


def change_bytes(content: bytearray, end: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 8))):
        content[rng.randrange(end)] = rng.choice(b'"0123456789-.eE{}[]:, \\n\x00\x7f\xff')


def change_digits(content: bytearray, end: int, rng: random.Random) -> None:
    digits = [place for place in range(8, end) if chr(content[place]).isdigit()]
    for place in rng.sample(digits, rng.choice((1, 2, 3))):
        content[place] = rng.choice(b"0123456789")


def cut_off(content: bytearray, end: int, rng: random.Random) -> None:
    del content[rng.randrange(end + 1) :]


def drop_or_repeat(content: bytearray, end: int, rng: random.Random) -> None:
    first = rng.randrange(8, end)
    last = min(end, first + rng.choice((1, 2, 16)))
    piece = rng.choice((b"", content[first:last] * 2))
    content[first:last] = piece
    content[:8] = (end - 8 + len(piece) - (last - first)).to_bytes(8, "little")


def change_length(content: bytearray, end: int, rng: random.Random) -> None:
    near = max(0, end - 8 + rng.randrange(-16, 17))
    content[:8] = rng.choice((rng.getrandbits(64), rng.getrandbits(27), 100_000_000, near)).to_bytes(8, "little")


DAMAGES: list[Damage] = [flip_bits, change_bytes, change_digits, cut_off, drop_or_repeat, change_length]


def damaged(whole: bytes, damage: Damage, rng: random.Random) -> bytes:
    content = bytearray(whole)
    damage(content, 8 + int.from_bytes(whole[:8], "little"), rng)
    return bytes(content)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    tensors = {
        "model.norm.weight": torch.ones(8),
        "gate": torch.ones(4, 6).bfloat16(),
        "counts": torch.arange(10),
        "scale": torch.tensor(1.5).half(),
        "none": torch.ones(0, 3),
    }
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    entries = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(path, entries, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_header(damage: Damage, small: bytes, tmp_path: Path) -> None:
    rng, path = random.Random(2024), tmp_path / "damaged.safetensors"
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(800):
            content = damaged(small, damage, rng)
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                header = read_header(path)
            except GlobeError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                try:
                    theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(content)}
                except SafetensorError as error:
                    pytest.fail(f"{content[8:]!r} was read, the library says {error}")
                assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == theirs
                for info in header.tensors.values():
                    assert read_tensor(info).nbytes == info.nbytes
            assert tracemalloc.get_traced_memory()[1] - before < 1 << 18
    finally:
        tracemalloc.stop()
    assert refused > 400


def entry(shape: object = (2,), offsets: object = (0, 4), dtype: object = "BF16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Each is followed by four bytes of data, and holds one thing that a header must not.
CRAFTED: dict[str, object] = {
    "a list": [],
    "a number": 5,
    "metadata no object": {"__metadata__": [], "t": entry()},
    "an entry is null": {"t": None},
    "no dtype": {"t": {"shape": [2], "data_offsets": [0, 4]}},
    "unknown dtype": {"t": entry(dtype="BF17")},
    "dtype a list": {"t": entry(dtype=["BF16"])},
    "shape a number": {"t": entry(shape=2)},
    "fractional shape": {"t": entry(shape=[2.0])},
    "truth for a size": {"t": entry(shape=[True, 2])},
    "negative sizes": {"t": entry(shape=[-1, -2])},
    "huge sizes": {"t": entry(shape=[1 << 62, 1 << 62, 8])},
    "sizes that wrap to the bytes": {"t": entry(shape=[(1 << 63) + 1, 2])},
    "fractional offsets": {"t": entry(offsets=[0.0, 4.0])},
    "three offsets": {"t": entry(offsets=[0, 2, 4])},
    "offsets swapped": {"t": entry(offsets=[4, 0])},
    "negative offset": {"t": entry(shape=[4], offsets=[-4, 4])},
    "past the end": {"t": entry(shape=[4], offsets=[0, 8])},
    "huge offset": {"t": entry(shape=[1 << 61], offsets=[0, 1 << 62])},
    "bytes of no tensor": {"t": entry(shape=[1], offsets=[0, 2])},
    "a hole": {"t": entry(shape=[1], offsets=[2, 4])},
    "overlap": {"t": entry(), "u": entry()},
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_header(case: str, tmp_path: Path) -> None:
    raw = json.dumps(CRAFTED[case]).encode()
    content, path = len(raw).to_bytes(8, "little") + raw + bytes(4), tmp_path / "crafted.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(GlobeError, match="crafted.safetensors"):
        read_header(path)


def test_damaged_shard_of_a_checkpoint(tmp_path: Path) -> None:
    """With an index every lost or renamed tensor is missed, so that a damaged header never goes unnoticed."""
    source = make_tiny("olmoe", tmp_path / "source", shards=2)
    whole = inspect(source)
    path = sorted(source.glob("*.safetensors"))[0]
    kept = Path(shutil.copy(path, tmp_path / "kept")).read_bytes()
    rng, refused = random.Random(2025), 0
    for trial in range(240):
        path.write_bytes(damaged(kept, DAMAGES[trial % len(DAMAGES)], rng))
        try:
            assert inspect(source)["families"] == whole["families"]
        except GlobeError:
            refused += 1
    assert refused > 200
