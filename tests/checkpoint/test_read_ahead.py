"""Tensors that the system is asked for before they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from globe.checkpoint.read_ahead import read_soon
from globe.checkpoint.tensorfile import read_header
from globe.errors import GlobeError


def test_the_bytes_of_the_tensors_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def note(descriptor: int, first: int, count: int, advice: int) -> None:
        asked.append((first, count))
        assert advice == os.POSIX_FADV_WILLNEED

    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        save_file({"a": torch.zeros(3), "b": torch.zeros(5), "c": torch.zeros(2)}, file)
    monkeypatch.setattr(os, "posix_fadvise", note, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    infos = [read_header(file).tensors[name] for file in files for name in ("a", "c")]
    read_soon(infos)
    assert asked == [(info.start, info.nbytes) for info in infos]
    monkeypatch.delattr(os, "posix_fadvise")
    read_soon(infos)
    assert len(asked) == 4


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be asked")
    save_file({"a": torch.zeros(3)}, tmp_path / "one")
    info = read_header(tmp_path / "one").tensors["a"]
    (tmp_path / "one").unlink()
    with pytest.raises(GlobeError, match="one: cannot be read"):
        read_soon([info])
