"""A source that is changed in place during a run, where its fingerprint does not look, is noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import globe.pipeline.compress as pipeline  # noqa: E402
from checkpoints import FUSED_ON_DISK, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.tensorfile import TensorInfo  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.settings import Settings  # noqa: E402
from killed import Killer  # noqa: E402
from trips import digests  # noqa: E402

SMALL: dict[str, Any] = {
    "rank": 0.5,
    "bank_size": 4,
    "outer_loops": 1,
    "support": 2,
    "device": "cpu",
    "threads": 1,
    **WEIGHTS_ONLY,
}
FUSED = next(iter(FUSED_ON_DISK))
CHOSEN = {"olmoe": ("up", 1, 5), FUSED: ("up", 0, 3), "olmoe in fp16": ("gate", 0, 2)}
PADDING = 1 << 23  # so far apart are the fingerprint's samples then that most bytes are in none


@pytest.fixture(params=CHOSEN)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A source of over 8 MiB, and which expert of it will be changed."""
    layout, *dtype = request.param.split(" in ")
    source = make_tiny(layout, tmp_path / "source", dtype="float16" if dtype else "bfloat16")
    tensors = load_file(source / "model.safetensors")
    if dtype:  # so faint that they are taken times a power of two
        tensors = {name: value * 2.0**-18 if ".experts." in name else value for name, value in tensors.items()}
        tensors = {name: value.half() for name, value in tensors.items()}
    tensors["model.padding"] = torch.zeros(PADDING, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source, request.param


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as running:
        yield running


def run(source: Path, out: Path, *, fresh: bool = False) -> Lines:
    lines = Lines()
    pipeline.compress(source, out, Settings(**SMALL), fresh=fresh, progress=lines)
    return lines


def flip_in_the_middle(source: Path, name: str) -> str:
    """Change one bit of an expert's values, unseen by the fingerprint; the name of its tensor."""
    family, layer, number = CHOSEN[name]
    before = Checkpoint(source)
    expert = next(e for e in before.family(family).experts if (e.layer, e.expert) == (layer, number))
    assert isinstance(expert.info, TensorInfo) and (len(expert.info.shape) == 3) == (name == FUSED)
    matrix = expert.info.nbytes // (expert.info.shape[0] if name == FUSED else 1)
    offset = expert.info.start + (expert.index or 0) * matrix + (matrix * 3 // 4 if expert.both else matrix // 2)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    assert Checkpoint(source).fingerprint() == before.fingerprint()
    return expert.tensor


def check_told(refused: GlobeError, tensor: str, name: str) -> None:
    family, layer, number = CHOSEN[name]
    line = str(refused)
    assert line.startswith(f"tensor {tensor} (expert {number} of layer {layer}, {family}) was changed during the run")
    found, expected = re.findall(r"\b[0-9a-f]{8}\b", line)
    assert found != expected and "--fresh" in line and "\n" not in line


def test_between_the_first_pass_and_writing(
    case: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source, name), tensors, write = case, [], pipeline.write_weights

    def changed_before(*arguments: Any) -> Any:
        tensors.append(flip_in_the_middle(source, name))
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_weights", changed_before)
        with pytest.raises(GlobeError) as refused:
            run(source, tmp_path / "out")
    check_told(refused.value, tensors[0], name)
    assert not (tmp_path / "out" / "config.json").exists()


def test_between_two_parts_of_a_run(killer: Killer, case: tuple[Path, str], tmp_path: Path) -> None:
    source, name = case
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(source, whole)
    assert killer.run(source, out, SMALL, place="globe.runs.store:RunStore.save", call=3) == -9
    tensor = flip_in_the_middle(source, name)
    for _ in range(2):
        with pytest.raises(GlobeError) as refused:
            run(source, out)
        check_told(refused.value, tensor, name)
    assert flip_in_the_middle(source, name) == tensor  # brought back
    run(source, out, fresh=True)
    assert digests(out) == digests(whole)


def test_what_the_store_says_is_what_is_checked(killer: Killer, case: tuple[Path, str], tmp_path: Path) -> None:
    """Digests survive the store bit for bit: a later part of the run, of the same source, finds no difference."""
    source, _ = case
    out = tmp_path / "out"
    assert killer.run(source, out, SMALL, place="globe.runs.store:RunStore.save", call=2) == -9
    assert "gate: scan" not in run(source, out).stages
    assert json.loads((out / "metrics.json").read_text())["stages"][1]["resumed"]
