"""Shelves of matrices: in memory and in a scratch file they hold the same."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from fake_mps import MPS, FakeMps, OnMps
from families import CPU
from globe.compute.shelf import InMemory, OnDisk, Shelf, Shelves

SHAPE = (7, 3, 5)
SPANS = [slice(0, 3), slice(3, 6), slice(6, 7)]
KINDS = ("memory", "disk")


def matrices() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def shelf_of(kind: str, folder: Path) -> Shelf:
    return InMemory(SHAPE, CPU) if kind == "memory" else OnDisk(SHAPE, CPU, folder / "shelf")


def taken(shelf: Shelf, spans: list[slice]) -> list[torch.Tensor]:
    return [part.clone() for part in shelf.take(spans)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_put_is_taken(kind: str, tmp_path: Path) -> None:
    shelf, wanted = shelf_of(kind, tmp_path), matrices()
    room = torch.empty(SHAPE)
    for span in reversed(SPANS):
        part = room[: span.stop - span.start]
        part.copy_(wanted[span])
        shelf.put(span, part)
        part.fill_(torch.nan)  # the memory is used again
    for spans in (SPANS, SPANS[::-1], SPANS[1:], [slice(k, k + 1) for k in range(7)], [slice(0, 7)], []):
        found = taken(shelf, spans)
        assert [len(part) for part in found] == [span.stop - span.start for span in spans]
        assert all(torch.equal(part, wanted[span]) for part, span in zip(found, spans, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_again_takes_its_place(kind: str, tmp_path: Path) -> None:
    shelf, wanted = shelf_of(kind, tmp_path), matrices()
    shelf.put(slice(0, 7), wanted)
    shelf.put(SPANS[1], -wanted[SPANS[1]])
    first, second, third = taken(shelf, SPANS)
    assert torch.equal(first, wanted[:3]) and torch.equal(second, -wanted[3:6]) and torch.equal(third, wanted[6:])


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_put_as_they_look(kind: str, tmp_path: Path) -> None:
    shelf = shelf_of(kind, tmp_path)
    shelf.put(slice(0, 7), torch.arange(15.0).view(5, 3).T.expand(7, -1, -1))
    found = torch.cat(taken(shelf, SPANS))
    assert torch.equal(found, torch.arange(15.0).view(5, 3).T.expand(7, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_kept(kind: str, tmp_path: Path) -> None:
    shelf = shelf_of(kind, tmp_path)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3.4e38, 1 / 3]).repeat(14)[:105].view(SHAPE)
    shelf.put(slice(0, 7), odd)
    assert torch.equal(torch.cat(taken(shelf, SPANS)).view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_they_are_rounded_and_take_half_the_room(kind: str, tmp_path: Path) -> None:
    shelf = Shelves(CPU, 210 if kind == "memory" else 209, tmp_path).make(SHAPE, dtype=torch.bfloat16)
    assert isinstance(shelf, InMemory) == (kind == "memory")
    shelf.put(slice(0, 7), matrices())
    assert torch.equal(torch.cat(taken(shelf, SPANS)), matrices().bfloat16())
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [210] * (kind == "disk")


def test_the_last_two_in_hand_are_whole(tmp_path: Path) -> None:
    shelf, wanted = shelf_of("disk", tmp_path), matrices()
    shelf.put(slice(0, 7), wanted)
    before: torch.Tensor | None = None
    for number, part in enumerate(shelf.take([slice(k, k + 1) for k in range(7)])):
        assert torch.equal(part[0], wanted[number])
        if before is not None:
            assert torch.equal(before[0], wanted[number - 1])
        before = part


def test_taking_may_end_early(tmp_path: Path) -> None:
    shelf, wanted = shelf_of("disk", tmp_path), matrices()
    shelf.put(slice(0, 7), wanted)
    alive = threading.active_count()
    reading = shelf.take(SPANS)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert threading.active_count() == alive
    assert torch.equal(torch.cat(taken(shelf, SPANS)), wanted)


def test_memory_goes_to_the_first_shelves(tmp_path: Path) -> None:
    each = 4 * 7 * 3 * 5
    shelves = Shelves(CPU, 2 * each + each // 2, tmp_path)
    made = [shelves.make(shape) for shape in (SHAPE, SHAPE, SHAPE, (7, 3, 2), (7, 3, 2))]
    assert [isinstance(shelf, InMemory) for shelf in made] == [True, True, False, True, False]
    assert sorted(file.stat().st_size for file in tmp_path.iterdir()) == [4 * 7 * 3 * 2, each]
    for shelf, factor in ((made[2], 1.0), (made[0], 2.0)):
        shelf.put(slice(0, 7), factor * matrices())
    assert torch.equal(torch.cat(taken(made[2], SPANS)), matrices())


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    shelf = shelf_of("disk", tmp_path)
    shelf.put(slice(0, 7), matrices())
    os.truncate(tmp_path / "shelf", 4 * 15 * 5)
    with pytest.raises(OSError, match="shelf: ends before expert 5"):
        taken(shelf, SPANS)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, write = shelf_of("disk", tmp_path), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, left, place: write(file, left[: max(0, 100 - place)], place))
    with pytest.raises(OSError, match="80 bytes of a batch cannot be written; is the disk full?"):
        shelf.put(SPANS[0], matrices()[:3])


def test_batches_may_be_larger_than_one_call_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, write, read = shelf_of("disk", tmp_path), os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, left, place: write(file, left[:100], place))
    monkeypatch.setattr(os, "preadv", lambda file, left, place: read(file, [left[0][:90]], place))
    shelf.put(slice(0, 7), matrices())
    assert torch.equal(torch.cat(taken(shelf, SPANS)), matrices())


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device(kind: str, tmp_path: Path) -> None:
    wanted = matrices()
    with FakeMps():
        shelf: Shelf = InMemory(SHAPE, MPS) if kind == "memory" else OnDisk(SHAPE, MPS, tmp_path / "shelf")
        for span in SPANS:
            shelf.put(span, wanted[span].to(MPS))
        found = list(shelf.take(SPANS))
        assert all(isinstance(part, OnMps) for part in found)
        assert all(torch.equal(part.cpu(), wanted[span]) for part, span in zip(found, SPANS, strict=True))
