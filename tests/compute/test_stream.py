"""Reading ahead, and work on one core each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from families import CPU, make_family, planted
from globe.checkpoint.tensorfile import bytes_read
from globe.compute.stream import Workers, ahead, expert_batches


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


def test_workers_have_one_core_each_and_leave_the_caller_its_own() -> None:
    threads = torch.get_num_threads()
    with Workers(CPU) as workers:
        assert list(workers.map(lambda k: (k, torch.get_num_threads()), 7)) == [(k, 1) for k in range(7)]
    assert torch.get_num_threads() == threads
    with Workers(torch.device("meta")) as workers:
        here = threading.get_ident()
        assert list(workers.map(lambda k: threading.get_ident(), 3)) == [here] * 3


def test_a_failing_expert_fails_the_pass() -> None:
    with pytest.raises(ZeroDivisionError), Workers(CPU) as workers:
        list(workers.map(lambda k: 1 // (3 - k), 10))
