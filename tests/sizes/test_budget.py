"""A ceiling of memory: blocks that fit below it, refusals that say what would, and a process that stays below it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import make_tiny
from families import CPU, WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS, make_family, make_job, planted, whole_pool
from globe import compress
from globe.checkpoint.family import Expert, Family
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import TensorInfo
from globe.choice.plan import plan
from globe.compute.blocks import BLOCKS, Blocks
from globe.compute.gemm import solver_dtype
from globe.errors import GlobeError, UsageError
from globe.fit.problem import Problem
from globe.pipeline.opening import Opened, scratch_bytes
from globe.settings import Settings
from globe.sizes import budget
from globe.sizes.budget import Cores, Room, fit_device, machine_memory, plan_blocks
from globe.sizes.kept import Kept, kept
from globe.sizes.ratios import Shape
from globe.statistics.memory import calibration_bytes, require_memory
from globe.statistics.metric import Metric
from refusals import command, refusal

GIB = 1 << 30


def family(experts: int = 1440, p: int = 1408, d: int = 2048) -> Family:
    """A family of Qwen1.5-MoE's size, of which nothing is read."""
    expert = Expert(0, 0, "w", TensorInfo(Path("none"), "BF16", (p, d), 0, 2 * p * d), None, 0)
    return Family("gate", (expert,) * experts, p, d)


def blocks_for(
    limit: int, mod: str = "exact", bank: int = 180, loops: int = 1, solver_bytes: int = 2, **more: Any
) -> Blocks:
    settings = Settings(**{"max_memory": limit, "mod": mod, "outer_loops": loops, **WEIGHTS_ONLY, **more})
    return plan_blocks({"gate": family()}, {"gate": Shape(704, bank, 0)}, settings, Cores(2, solver_bytes))


def test_full_size_fits_as_promised() -> None:
    assert blocks_for(6 * GIB, "aligned").experts == BLOCKS.experts
    assert blocks_for(8 * GIB, "exact").experts >= BLOCKS.experts // 2
    assert blocks_for(64 * GIB, "exact", solver_bytes=4) == BLOCKS


@given(st.integers(3, 40), st.sampled_from(["exact", "aligned", "fixed"]))
def test_more_memory_never_means_smaller_blocks(quarters: int, mod: str) -> None:
    try:
        small = blocks_for(quarters * GIB // 4 + GIB, mod)
    except UsageError:
        return
    large = blocks_for(quarters * GIB // 4 + 2 * GIB, mod)
    assert large.experts >= small.experts and large.columns >= small.columns
    assert large.proxy_bytes >= small.proxy_bytes


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UsageError, match="max_memory is 4GiB; family gate .* needs at least .*GiB; use ") as refusal:
        blocks_for(4 * GIB, "exact")
    assert "--mod aligned" in str(refusal.value)
    words = str(refusal.value).replace(" or", "").split()
    bank = int(words[words.index("--bank-size") + 1])
    assert blocks_for(4 * GIB, "exact", bank).experts >= 1
    needed = words[words.index("--max-memory") + 1]
    assert blocks_for(int(float(needed.removesuffix("GiB")) * GIB), "exact").experts >= 1


def test_a_machine_has_memory() -> None:
    assert 1 << 28 < machine_memory() < 1 << 46


def test_the_plan_follows_the_machine_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, settings = {"gate": Shape(704, 180, 0)}, Settings(mod="aligned", **WEIGHTS_ONLY)
    monkeypatch.setattr(budget, "machine_memory", lambda: 24 * GIB)
    assert plan_blocks({"gate": family()}, shapes, settings, Cores(2, 2)) == BLOCKS
    monkeypatch.setattr(budget, "machine_memory", lambda: 2 * GIB)
    with pytest.raises(UsageError, match="max_memory is 1GiB"):
        plan_blocks({"gate": family()}, shapes, settings, Cores(2, 2))


JOINT = {"solver": "joint"}


def test_the_joint_fit_keeps_in_memory_what_fits() -> None:
    sizes = [4 * 1440 * each for each in (704 * 704, 704 * 2048, 1408 * 2048)]  # C_i, a basis or K_i, W'_i
    whole = blocks_for(100 * GIB, **JOINT)
    assert whole == BLOCKS and kept_of(whole).in_memory == sum(sizes)
    found = {limit: kept_of(blocks_for(limit * GIB, **JOINT)) for limit in (16, 20, 28, 64)}
    assert {each.in_memory + each.on_disk for each in found.values()} == {sum(sizes)}
    memory = [each.in_memory for each in found.values()]
    assert memory == sorted(memory) and memory[0] < sizes[0] + sizes[1] < memory[-1]
    assert found[20].buffer > found[64].buffer == 0
    assert blocks_for(14 * GIB, **JOINT, loops=0) == blocks_for(14 * GIB, loops=0, solver="alternate")


def kept_of(blocks: Blocks, **more: Any) -> Kept:
    settings = Settings(**{**WEIGHTS_ONLY, **JOINT, **more})
    return kept(family(), Shape(704, 180, 0), settings, 2, blocks.cached)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_what_is_kept_counts_where_it_will_be(precision: Literal["fp32", "auto"], tmp_path: Path) -> None:
    """Sizes from shapes alone are those of the shelves and files that a fit makes."""
    weights = planted(0, experts=8, p=6, d=10, rank=5, atoms=3)
    experts, shape = make_family(tmp_path / "source", weights), Shape(5, 3, 0)
    columns = {layer: torch.eye(10) for layer in range(2)}
    size = solver_dtype(precision, CPU).itemsize
    for metric in (None, Metric(torch.ones(8, 6), columns, None, (0,) * 4 + (1,) * 4)):
        settings = Settings(calibrate="none" if metric is None else "pydoc", precision=precision)
        for cached in (0, 4 * 8 * 25, 4 * 8 * (25 + 50), 1 << 20):
            folder = tmp_path / f"{metric is None}-{cached}"
            folder.mkdir()
            job = make_job(settings, blocks=Blocks(cached=cached))
            Problem(whole_pool(experts, metric), (3, 5, 10), job, folder)
            found = kept(experts, shape, settings, size, cached)
            assert sum(file.stat().st_size for file in folder.iterdir()) == found.on_disk
            assert found.in_memory <= cached and (found.on_disk == 0) == (cached == 1 << 20)
    auto = kept(experts, shape, Settings(), size, 4 * 8 * 200)
    assert auto.on_disk == max(
        kept(experts, shape, Settings(calibrate=each), size, 4 * 8 * 200).on_disk for each in ("none", "pydoc")
    )


@pytest.mark.parametrize("calibrate", ["none", "auto"])
def test_the_joint_fit_takes_14_gib_at_full_size(calibrate: str) -> None:
    assert blocks_for(14 * GIB, **{**JOINT, "calibrate": calibrate}).experts >= 8


@given(st.integers(13, 60))
def test_more_memory_never_means_a_smaller_joint_fit(size: int) -> None:
    small, large = (blocks_for(limit * GIB, **JOINT) for limit in (size, size + 4))
    assert (small.experts, small.cached) <= (large.experts, large.cached)


def test_a_joint_fit_that_cannot_be_is_refused_with_what_would() -> None:
    more = {"solver": "joint", "mod": "aligned"}
    with pytest.raises(UsageError, match="max_memory is 7GiB; family gate .* or --solver alternate$") as refusal:
        blocks_for(7 * GIB, **more)
    words = str(refusal.value).replace(" or", "").split()
    bank = int(words[words.index("--bank-size") + 1])
    assert blocks_for(7 * GIB, bank=bank, **more).experts >= 1
    needed = float(words[words.index("--max-memory") + 1].removesuffix("GiB"))
    assert blocks_for(int(needed * GIB), **more).experts >= 1
    assert blocks_for(7 * GIB, "aligned").experts >= 1


def test_a_disk_without_room_for_scratch_files_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    settings = Settings(rank=0.5, bank_size=3, device="cpu", calibrate="none")
    planned = plan(source, settings)
    cramped = replace(planned, blocks=replace(planned.blocks, cached=0))
    needed = scratch_bytes(cramped, settings)
    count, p, d = len(planned.families["gate"]), planned.families["gate"].p, planned.families["gate"].d
    rank = planned.shapes["gate"].rank
    assert scratch_bytes(planned, settings) == 0 and needed == 4 * count * (rank * rank + rank * d + p * d)
    monkeypatch.setattr("globe.pipeline.opening.plan", lambda *given: cramped)
    claim = Opened(source, cramped, "", False).claim(settings)
    usual, more = claim.needed_bytes, claim.all_bytes - claim.needed_bytes
    assert 0 < more < needed  # they are gone before the output is written
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, usual + more - 1))
    wanted = rf"{more:,} of them for matrices of experts .*; free some or name another disk, or use --max-memory .*GiB"
    with pytest.raises(GlobeError, match=wanted + " or --solver alternate$"):
        compress(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, usual - 1))
    with pytest.raises(GlobeError, match="free some or name another disk$"):
        compress(source, tmp_path / "out", settings)


def device_blocks(free: int, blocks: Blocks = BLOCKS, bank: int = 180, **more: Any) -> Blocks:
    settings = Settings(**{**WEIGHTS_ONLY, **more})
    return fit_device(blocks, {"gate": family()}, {"gate": Shape(704, bank, 0)}, settings, Room("cuda:0", free))


def test_batches_follow_the_memory_of_a_device() -> None:
    assert device_blocks(80 * GIB) == BLOCKS
    sizes = [device_blocks(free * GIB, mod="aligned").experts for free in (3, 4, 6, 8, 12, 24)]
    assert sizes == sorted(sizes) and 2 <= sizes[0] < sizes[-1] == BLOCKS.experts
    assert (
        device_blocks(24 * GIB, solver="joint").cached < BLOCKS.cached == device_blocks(80 * GIB, solver="joint").cached
    )
    small = Blocks(experts=8, columns=64)
    assert device_blocks(80 * GIB, small) == small
    assert device_blocks(80 * GIB, Blocks(experts=1)).experts == 2


@given(st.integers(12, 60))
def test_more_memory_of_a_device_never_means_less_in_hand(size: int) -> None:
    small, large = (device_blocks(free * GIB, solver="joint", calibrate="auto") for free in (size + 8, size + 12))
    assert (small.experts, small.cached) <= (large.experts, large.cached)


def test_a_device_without_room_for_two_experts_is_refused_with_what_would_do() -> None:
    wanted = (
        r"^device cuda:0 has 2GiB free; family gate \(1440 experts, rank 704, bank 180\) needs at least .*GiB there"
    )
    with pytest.raises(
        UsageError, match=wanted + ", two experts at a time; use --device cpu or --bank-size"
    ) as refusal:
        device_blocks(2 * GIB, mod="aligned")
    assert "\n" not in str(refusal.value)
    bank = int(str(refusal.value).split("--bank-size ")[1].split()[0])
    assert device_blocks(2 * GIB, mod="aligned", bank=bank).experts >= 2


def test_a_device_without_room_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 20, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 48 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 << 20)
    settings = Settings(rank=0.5, bank_size=3, device="cuda", **WEIGHTS_ONLY)
    with pytest.raises(UsageError, match=r"^device cuda has 96MiB free; family gate .* use --device cpu$"):
        compress(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 8 << 30))
    assert plan(source, settings).blocks.experts == BLOCKS.experts


def test_a_batch_in_shared_memory_counts_whole() -> None:
    settings = Settings(max_memory=6 * GIB, mod="aligned", **WEIGHTS_ONLY)
    given_blocks = [
        plan_blocks({"gate": family()}, {"gate": Shape(704, 180, 0)}, settings, Cores(threads, 4))
        for threads in (2, None)
    ]
    assert given_blocks[1].experts < given_blocks[0].experts == BLOCKS.experts


def test_calibration_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source")
    needed = calibration_bytes(Checkpoint(source), 1024)
    assert budget.BASE < needed < calibration_bytes(Checkpoint(source), 1 << 20)
    with_down = Settings(families=("gate", "down"), calibration_tokens=1024, max_memory=needed)
    with pytest.raises(UsageError, match="calibration needs about"):  # it gathers moments of down's inputs
        require_memory(Checkpoint(source), with_down)
    options = {"calibration_tokens": 1024, "max_memory": needed - 1}
    for calibrate in ("auto", "pydoc"):
        with pytest.raises(UsageError, match=r"calibration needs about .*iB: use --max-memory .* --calibrate none$"):
            require_memory(Checkpoint(source), Settings(calibrate=calibrate, **options))
    for other in ({"calibrate": "none"}, {"calibrate": "FILE"}, {"max_memory": needed}):
        require_memory(Checkpoint(source), Settings(**{**options, **other}))


@pytest.mark.parametrize("options", [WEIGHTS_ONLY_OPTIONS, ("--joint-steps", "3", "--calibration-tokens", "1024")])
def test_a_run_stays_below_its_ceiling_and_another_is_refused_at_once(options: tuple[str, ...], tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    sizes = ("--rank", "0.5", "--bank-size", "3", "--device", "cpu", *options, "--max-memory")
    call = command("compress", source, tmp_path / "out", "-q", "--json", *sizes, "800MiB")
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    metrics = json.loads(done.stdout)
    assert max(stage["peak_rss_bytes"] for stage in metrics["stages"]) < 800 << 20
    assert metrics["settings"]["max_memory"] == 800 << 20
    assert "max_memory is 500MiB" in refusal(2, "compress", source, tmp_path / "other", *sizes, "500MiB")
    assert not (tmp_path / "other").exists()
