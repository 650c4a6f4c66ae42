"""Digests of experts: of what is stored, whatever the scale in which a family is taken."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import architectures
import codes
from checkpoints import make_tiny
from families import make_family, silent
from globe.checkpoint.family import Expert, Family
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError
from globe.seeds.proxies import scan
from globe.settings import Settings

LAYOUTS = ["olmoe", "qwen3_5_moe"]
OTHERS = ["gpt_oss", "fp8"]  # stacks across and in turns; codes and scales


def digest_of(family: Family, number: int) -> int:
    return family.read_digested(number, torch.empty(family.p, family.d, dtype=family.dtype))


def by_hand(expert: Expert) -> int:
    values = expert.read((0, expert.matrix[0]))
    return zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def source_of(layout: str, dtype: str, directory: Path) -> Path:
    if layout == "gpt_oss":
        architectures.tiny_model("gpt_oss").save_pretrained(directory)
        return directory
    if layout == "fp8":
        return codes.fp8_checkpoint(make_tiny("qwen3_moe", directory))
    return make_tiny(layout, directory, dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*itertools.product(LAYOUTS, ["bfloat16", "float16", "float32"]), *((other, "bfloat16") for other in OTHERS)],
)
def test_they_are_of_the_values_as_stored(layout: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(source_of(layout, dtype, tmp_path / "source"))
    for name in ("gate", "up", "down"):
        family = checkpoint.family(name)
        found = scan(family, Settings(), silent).digests
        assert found.tolist() == [by_hand(expert) for expert in family.experts]
        assert len(set(found.tolist())) == len(family)
        scaled = replace(family, experts=tuple(replace(expert, exponent=-20) for expert in family.experts))
        assert [digest_of(scaled, number) for number in range(len(scaled))] == found.tolist()
        out, wanted = torch.empty(family.p, family.d, dtype=scaled.dtype), scaled.read(1)
        scaled.read_digested(1, out)
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("bit", [0, 7, 4 * 12 * 9 * 8 // 2, 4 * 12 * 9 * 8 - 1])
def test_any_bit_of_an_expert_is_told_and_no_other(bit: int, tmp_path: Path) -> None:
    family = make_family(tmp_path, np.random.default_rng(5).standard_normal((6, 12, 9)))
    experts = tuple(replace(expert, digest=digest_of(family, number)) for number, expert in enumerate(family.experts))
    family, out = replace(family, experts=experts), torch.empty(12, 9)
    place = family.experts[4].info
    content = bytearray(place.file.read_bytes())
    content[place.start + bit // 8] ^= 1 << bit % 8
    place.file.write_bytes(content)
    for number in (0, 1, 2, 3, 5):
        family.read_again(number, out)
        assert torch.equal(out, family.read(number))
    with pytest.raises(GlobeError, match=rf"^tensor {family.experts[4].tensor} .*changed during the run.*--fresh"):
        family.read_again(4, out)


def test_without_a_digest_nothing_is_compared(tmp_path: Path) -> None:
    family, out = make_family(tmp_path, np.ones((2, 3, 4))), torch.empty(3, 4)
    family.read_again(1, out)
    assert torch.equal(out, torch.ones(3, 4))
