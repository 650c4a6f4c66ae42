"""What a run store keeps, and what it makes of damage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from globe.runs import store as runstore  # noqa: E402
from globe.runs.store import RunStore  # noqa: E402
from refusals import cut, flip  # noqa: E402


def test_a_store_keeps_bits(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "store", {"a": 1}, {}, lambda line: None)
    tensors = {
        "fp32": torch.randn(3, 5, 7),
        "fp64": torch.randn(4, 2, dtype=torch.float64),
        "bf16": torch.randn(2, 3).bfloat16(),
        "strided": torch.randn(6, 4).T,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "long": torch.arange(9 << 20, dtype=torch.float32),
    }
    meta = {"pi": 3.141592653589793, "tiny": 5e-324, "text": "Ω", "none": None}
    store.save("r", tensors, meta)
    store.save(
        "plain", {}, {"x": (1, np.int64(2)), "by number": {10: np.float32(0.5), 9: np.arange(2)}, "nan": math.nan}
    )
    plain = store.load("plain")
    assert plain is not None and math.isnan(plain.meta.pop("nan"))
    assert plain.meta == {"x": [1, 2], "by number": {"10": 0.5, "9": [0, 1]}}
    again = RunStore(tmp_path / "store", {"a": 1}, {}, lambda line: None)
    assert again.names() == ["plain", "r"]
    saved = again.load("r")
    assert saved is not None and saved.meta == meta == again.check("r")
    assert list(saved.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert saved.tensors[name].dtype == tensor.dtype and torch.equal(saved.tensors[name], tensor), name
    assert again.load("absent") is None and again.check("absent") is None
    again.drop("r")
    assert again.load("r") is None and [path.name for path in again.directory.glob("r*")] == []
    (again.directory / "orphan.safetensors").write_bytes(b"x")
    (again.directory / ".r.safetensors.partial").write_bytes(b"x")
    with again.scratch() as folder:
        assert Path(folder).parent == again.directory
        RunStore(tmp_path / "store", {"a": 1}, {}, lambda line: None)
    assert sorted(path.name for path in again.directory.iterdir()) == ["key.json", "plain.json"]


@pytest.mark.parametrize("damage", [cut, lambda path: flip(path, 0.0), lambda path: flip(path, 0.5), Path.unlink])
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_store_gives_nothing_that_is_damaged(kind: str, damage: Callable[[Path], object], tmp_path: Path) -> None:
    for look in ("load", "check"):
        lines: list[str] = []
        store = RunStore(tmp_path / look, {}, {}, lines.append)
        store.save("r", {"x": torch.randn(64)}, {"text": "a long enough text to be damaged in the middle of it" * 5})
        damage(store.directory / f"r.{kind}")
        assert getattr(store, look)("r") is None
        assert len(lines) == (0 if kind == "json" and damage is Path.unlink else 1)
        assert store.names() == []


def test_differences() -> None:
    found = {"a": 1, "b": {"c": [1], "d": "x" * 64}, "e": None}
    assert runstore.differences(found, found) == []
    lines = runstore.differences(found, {"a": 2, "b": {"c": [2], "d": "y" * 64}, "f": 1.5})
    assert lines[0] == "a (found 1, expected 2)" and lines[1] == "b.c (found [1], expected [2])"
    assert lines[3] == "f (found null, expected 1.5)" and all(len(line) < 100 for line in lines)
