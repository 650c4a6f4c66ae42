"""A ceiling of memory: blocks that fit below it, refusals that say what would, and a process that stays below it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import make_tiny
from families import WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS
from globe import compress
from globe.checkpoint.family import Expert, Family
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import TensorInfo
from globe.choice.plan import plan
from globe.compute.blocks import BLOCKS, Blocks
from globe.errors import UsageError
from globe.settings import Settings
from globe.sizes import budget
from globe.sizes.budget import Room, fit_device, machine_memory, plan_blocks
from globe.sizes.ratios import Shape
from globe.statistics.memory import calibration_bytes, require_memory

GIB = 1 << 30


def family(experts: int = 1440, p: int = 1408, d: int = 2048) -> Family:
    """A family of Qwen1.5-MoE's size, of which nothing is read."""
    expert = Expert(0, 0, "w", TensorInfo(Path("none"), "BF16", (p, d), 0, 2 * p * d), None, 0)
    return Family("gate", (expert,) * experts, p, d)


def blocks_for(
    limit: int, mod: str = "exact", bank: int = 180, loops: int = 1, exact_bytes: int = 2, **more: Any
) -> Blocks:
    settings = Settings(**{"max_memory": limit, "mod": mod, "outer_loops": loops, **WEIGHTS_ONLY, **more})
    return plan_blocks({"gate": family()}, {"gate": Shape(704, bank, 0)}, settings, 2, exact_bytes)


def test_full_size_fits_as_promised() -> None:
    assert blocks_for(6 * GIB, "aligned").experts == BLOCKS.experts
    assert blocks_for(8 * GIB, "exact").experts >= BLOCKS.experts // 2
    assert blocks_for(64 * GIB, "exact", exact_bytes=4) == BLOCKS


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
    assert plan_blocks({"gate": family()}, shapes, settings, 2, 2) == BLOCKS
    monkeypatch.setattr(budget, "machine_memory", lambda: 2 * GIB)
    with pytest.raises(UsageError, match="max_memory is 1GiB"):
        plan_blocks({"gate": family()}, shapes, settings, 2, 2)


def test_the_joint_fit_takes_fewer_pairs_and_keeps_no_experts() -> None:
    joint = {"solver": "joint", "mod": "aligned"}
    whole = 4 * 1440 * 1408 * 2048
    assert blocks_for(100 * GIB, **joint) == BLOCKS and BLOCKS.cached >= whole
    some = blocks_for(24 * GIB, **joint)
    assert (some.cached, some.pairs) == (0, BLOCKS.pairs)
    fewer = blocks_for(14 * GIB, **joint)
    assert fewer.cached == 0 and 1 <= fewer.pairs < BLOCKS.pairs
    assert blocks_for(14 * GIB, **joint, loops=0) == blocks_for(14 * GIB, "aligned", loops=0)
    calibrated = blocks_for(14 * GIB, **joint, calibrate="auto")
    assert calibrated.pairs <= fewer.pairs and calibrated.experts <= fewer.experts


@pytest.mark.parametrize("mod", ["exact", "aligned"])
def test_the_joint_fit_takes_12_gib_at_full_size(mod: str) -> None:
    assert blocks_for(12 * GIB, mod, solver="joint", calibrate="auto").pairs >= 4


@given(st.integers(9, 60))
def test_more_memory_never_means_a_smaller_joint_fit(size: int) -> None:
    small, large = (blocks_for(limit * GIB, "aligned", solver="joint") for limit in (size, size + 4))
    assert small.pairs <= large.pairs and small.experts <= large.experts and small.cached <= large.cached


def test_a_joint_fit_that_cannot_be_is_refused_with_what_would() -> None:
    with pytest.raises(UsageError, match="max_memory is 7GiB; family gate .* or --solver alternate$") as refusal:
        blocks_for(7 * GIB, "aligned", solver="joint")
    words = str(refusal.value).replace(" or", "").split()
    bank = int(words[words.index("--bank-size") + 1])
    assert blocks_for(7 * GIB, "aligned", bank, solver="joint").pairs == 1
    needed = float(words[words.index("--max-memory") + 1].removesuffix("GiB"))
    assert blocks_for(int(needed * GIB), "aligned", solver="joint").pairs >= 1
    assert blocks_for(7 * GIB, "aligned").experts >= 1


def device_blocks(free: int, blocks: Blocks = BLOCKS, bank: int = 180, **more: Any) -> Blocks:
    settings = Settings(**{**WEIGHTS_ONLY, **more})
    return fit_device(blocks, {"gate": family()}, {"gate": Shape(704, bank, 0)}, settings, Room("cuda:0", free))


def test_batches_follow_the_memory_of_a_device() -> None:
    assert device_blocks(80 * GIB) == BLOCKS
    sizes = [device_blocks(free * GIB, mod="aligned").experts for free in (3, 4, 6, 8, 12, 24)]
    assert sizes == sorted(sizes) and 2 <= sizes[0] < sizes[-1] == BLOCKS.experts
    assert device_blocks(24 * GIB, solver="joint", mod="aligned").cached == 0
    small = Blocks(experts=8, columns=64, pairs=3)
    assert device_blocks(80 * GIB, small) == small
    assert device_blocks(80 * GIB, Blocks(experts=1)).experts == 2


@given(st.integers(9, 60))
def test_more_memory_of_a_device_never_means_less_in_hand(size: int) -> None:
    small, large = (device_blocks(free * GIB, solver="joint", calibrate="auto") for free in (size + 8, size + 12))
    assert small.experts <= large.experts and small.pairs <= large.pairs and small.cached <= large.cached


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
    with pytest.raises(UsageError, match=r"^device cuda has 0\.1GiB free; family gate .* use --device cpu$"):
        compress(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 8 << 30))
    assert plan(source, settings).blocks.experts == BLOCKS.experts


def test_a_batch_in_shared_memory_counts_whole() -> None:
    settings = Settings(max_memory=6 * GIB, mod="aligned", **WEIGHTS_ONLY)
    given_blocks = [
        plan_blocks({"gate": family()}, {"gate": Shape(704, 180, 0)}, settings, threads, 4) for threads in (2, None)
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
        with pytest.raises(UsageError, match=r"calibration needs about .*GiB: use --max-memory .* --calibrate none$"):
            require_memory(Checkpoint(source), Settings(calibrate=calibrate, **options))
    for other in ({"calibrate": "none"}, {"calibrate": "FILE"}, {"max_memory": needed}):
        require_memory(Checkpoint(source), Settings(**{**options, **other}))


@pytest.mark.parametrize("options", [WEIGHTS_ONLY_OPTIONS, ("--joint-steps", "10", "--calibration-tokens", "1024")])
def test_a_run_stays_below_its_ceiling_and_another_is_refused_at_once(options: tuple[str, ...], tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    call = [sys.executable, "-m", "globe", "compress", str(source), str(tmp_path / "out"), "-q", "--json"]
    call += ["--rank", "0.5", "--bank-size", "3", "--device", "cpu", *options, "--max-memory"]
    done = subprocess.run([*call, "800MiB"], capture_output=True, text=True, check=True)
    metrics = json.loads(done.stdout)
    assert max(stage["peak_rss_bytes"] for stage in metrics["stages"]) < 800 << 20
    assert metrics["settings"]["max_memory"] == 800 << 20
    call[5] = str(tmp_path / "other")
    refused = subprocess.run([*call, "500MiB"], capture_output=True, text=True)
    assert refused.returncode == 2 and "max_memory is 0.5GiB" in refused.stderr
    assert not (tmp_path / "other").exists()
