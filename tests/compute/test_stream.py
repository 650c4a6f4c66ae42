"""Reading ahead, and the way to a device."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from families import CPU, make_family, planted
from globe.checkpoint.tensorfile import bytes_read
from globe.compute.stream import Lane, ahead, expert_batches


def test_results_come_in_order_while_the_next_job_runs() -> None:
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        return number

    seen = []
    for number in ahead((lambda n=n: job(n)) for n in range(5)):  # type: ignore[misc]
        time.sleep(0.01)
        seen.append((number, max(begun)))
    assert [number for number, _ in seen] == list(range(5))
    assert all(latest == min(number + 1, 4) for number, latest in seen)
    assert list(ahead([])) == []


def test_a_failing_job_fails_where_its_result_is_due() -> None:
    def broken() -> int:
        raise OSError("disk")

    found: list[int] = []
    with pytest.raises(OSError, match="disk"):
        for value in ahead([lambda: 1, broken, lambda: 3]):
            found.append(value)
    assert found == [1]


def test_a_caller_that_stops_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    readings: Iterator[int] = ahead((lambda n=n: n) for n in range(100))  # type: ignore[misc]
    assert next(readings) == 0
    readings.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_pass_reads_every_expert_once(size: int, tmp_path: Path) -> None:
    weights = planted(0, experts=8, p=6, d=5, rank=2, atoms=3).astype(np.float32)
    family = make_family(tmp_path, weights.astype(np.float64))
    before, found = bytes_read(), []
    for span, batch in expert_batches(family, size, CPU):
        assert len(batch) == span.stop - span.start <= size
        found.append(batch.clone())
    np.testing.assert_array_equal(torch.cat(found).numpy(), weights)
    assert bytes_read() - before == weights.nbytes


def test_a_pass_over_some_reads_those(tmp_path: Path) -> None:
    weights = planted(0, experts=8, p=6, d=5, rank=2, atoms=3).astype(np.float32)
    family = make_family(tmp_path, weights.astype(np.float64))
    found = [(span, batch.clone()) for span, batch in expert_batches(family, 2, CPU, slice(3, 8))]
    assert [span for span, _ in found] == [slice(3, 5), slice(5, 7), slice(7, 8)]
    np.testing.assert_array_equal(torch.cat([batch for _, batch in found]).numpy(), weights[3:8])
    assert list(expert_batches(family, 2, CPU, slice(3, 3))) == []


class FakeCuda:
    """A CUDA device whose copies are made when somebody waits for them, and what was done in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.streams = threading.local()
        self.carried: list[tuple[torch.Tensor, torch.Tensor]] = []
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, "lane"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(self, "caller"))
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: self.pinned(empty(*shape, **more)))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.done.append("kept"))
        monkeypatch.setattr(Pinned, "cuda", self)

    def pinned(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.as_subclass(Pinned)


class Pinned(torch.Tensor):
    """Pinned memory; what is sent from it is read when the copy is made."""

    cuda: FakeCuda

    def to(self, device: torch.device, *, non_blocking: bool) -> torch.Tensor:  # type: ignore[override]
        assert non_blocking and device.type == "cuda"
        there = torch.full(self.shape, torch.nan)
        self.cuda.carried.append((self, there))
        return there


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.cuda, *self.cuda.carried[-1])

    def wait_event(self, event: FakeEvent) -> None:
        assert self.name == "caller"
        event.happen()


class FakeEvent:
    def __init__(self, cuda: FakeCuda, here: torch.Tensor, there: torch.Tensor) -> None:
        self.cuda, self.here, self.there, self.happened = cuda, here, there, False

    def happen(self) -> None:
        if not self.happened:
            self.there.copy_(self.here)
            self.happened = True

    def synchronize(self) -> None:
        self.cuda.done.append("waited")
        self.happen()


@pytest.mark.parametrize("size", [1, 3])
def test_what_goes_to_cuda_arrives_before_its_memory_is_read_into_again(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = planted(0, experts=8, p=6, d=5, rank=2, atoms=3).astype(np.float32)
    family = make_family(tmp_path, weights.astype(np.float64))
    cuda = FakeCuda(monkeypatch)
    batches = [batch for _, batch in expert_batches(family, size, torch.device("cuda"))]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), weights)
    assert cuda.done.count("kept") == len(batches)
    assert cuda.done.count("waited") == max(0, len(batches) - 3)


def test_elsewhere_what_is_sent_goes_when_it_is_taken() -> None:
    lane = Lane(CPU)
    memory = lane.memory((2, 3), torch.float32)
    sent = lane.send(lambda out: out.fill_(4.0)[:1], memory)
    assert torch.equal(lane.take(sent), torch.full((1, 3), 4.0))
