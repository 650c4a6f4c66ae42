"""Compressions under a time limit, on a clock that only passes and products move."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from clocks import Clock, moved_by_fits  # noqa: E402
from displays import Lines  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.artifact.factored import MANIFEST  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.choice.estimate import Estimate, Expected  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.compute.rates import Rates  # noqa: E402
from globe.errors import UsageError  # noqa: E402
from globe.pipeline import compress as compressing  # noqa: E402
from globe.pipeline import schedule  # noqa: E402
from globe.pipeline.batch import batch  # noqa: E402
from globe.pipeline.compress import Result  # noqa: E402
from globe.runs.stages import Stage  # noqa: E402
from globe.runs.store import FOLDER  # noqa: E402
from globe.runs.turn import Turn  # noqa: E402
from trips import digests  # noqa: E402

PASS, PRODUCT = 10.0, 1.0
FAST = Rates(1e18, 1e18, 1e18, 1e18, 0.0, reading=1e18, writing=1e18)  # what is estimated takes no time
SMALL: dict[str, Any] = {
    "joint_steps": 20,
    "rank": 0.5,
    "bank_size": 8,
    "support": 2,
    "tolerance": 0.0,
    "device": "cpu",
    "threads": 1,
    "calibrate": "none",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    moved_by_fits(found, monkeypatch, PASS, PRODUCT)
    monkeypatch.setattr(compressing.ranks, "clock", found)
    monkeypatch.setattr(compressing, "perf_counter", found)
    monkeypatch.setattr(schedule, "measured_rates", lambda planned, settings: FAST)
    return found


def run(source: Path, out: Path, **changed: Any) -> tuple[Result, list[str]]:
    lines = Lines()
    options = {key: changed.pop(key) for key in ("fresh", "keep_run", "began") if key in changed}
    return compress(source, out, Settings(**{**SMALL, **changed}), progress=lines, **options), lines.lines


@pytest.mark.parametrize("changed", [{}, {"scope": 1}, {"share_families": True}, {"method": "grouped-subspace"}])
def test_a_limit_cuts_the_fits_and_what_is_written_is_whole(
    changed: dict[str, Any], source: Path, clock: Clock, tmp_path: Path
) -> None:
    began, limit = clock(), 300
    result, lines = run(source, tmp_path / "out", time_limit=limit, **changed)
    assert clock() <= began + limit
    families = result.metrics.get("pools", result.metrics["families"])
    assert all(found["joint"]["stopped"] == "time_limit" and found["joint"]["steps"] > 0 for found in families.values())
    assert all(found["support_median"] <= 2 for found in families.values())
    assert sum("iterations" in line for line in lines) == len(families)
    assert result.metrics["settings"]["time_limit"] == limit
    written = export(tmp_path / "out", tmp_path / "dense")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "report.html", MANIFEST}
    del written
    for name in ("gate", "up"):
        before, after = (Checkpoint(place).family(name) for place in (source, tmp_path / "dense"))
        lost = sum(float((before.read(k).float() - after.read(k).float()).square().sum()) for k in range(len(before)))
        whole = sum(float(before.read(k).float().square().sum()) for k in range(len(before)))
        assert result.metrics["families"][name]["relative_error"] == pytest.approx(lost / whole, rel=1e-3)


def test_pools_share_the_time_by_their_cost(source: Path, clock: Clock, tmp_path: Path) -> None:
    result, _ = run(source, tmp_path / "out", time_limit=400)
    steps = [found["joint"]["steps"] for found in result.metrics["families"].values()]
    assert min(steps) > 2 and abs(steps[0] - steps[1]) <= 1
    cut = compress(source, tmp_path / "cut", Settings(**SMALL, time_limit=400), began=clock() - 200)
    assert all(
        0 < found["joint"]["steps"] < before
        for found, before in zip(cut.metrics["families"].values(), steps, strict=True)
    )


def test_a_limit_that_suffices_changes_nothing(source: Path, clock: Clock, tmp_path: Path) -> None:
    for name, limit in (("free", None), ("timed", "10h")):
        run(source, tmp_path / name, time_limit=limit, joint_steps=3)
    free, timed = (digests(tmp_path / name) for name in ("free", "timed"))
    assert free == timed


def test_loops_are_cut_too(source: Path, clock: Clock, tmp_path: Path) -> None:
    began = clock()
    result, lines = run(source, tmp_path / "out", solver="alternate", time_limit=100, patience=100)
    assert clock() <= began + 100
    for found in result.metrics["families"].values():
        assert found["stopped"] == "time_limit" and 0 < len(found["history"]) < 6
    assert sum(line.endswith(" loops") for line in lines) == 2


def test_too_short_a_limit_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Rates(1e6, 1e6, 1e6, 1e6, 1e-3)
    monkeypatch.setattr(schedule, "measured_rates", lambda planned, settings: slow)
    wanted = (
        r"^time_limit is 10 s; reading, calibration, seeds, one pass of every fit and writing are estimated to take "
        r"\d.* here; use --time-limit (\d+)s or more$"
    )
    with pytest.raises(UsageError, match=wanted) as refusal:
        run(source, tmp_path / "out", time_limit=10, calibrate="pydoc")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()
    enough = int(re.search(r"--time-limit (\d+)s", str(refusal.value))[1])  # type: ignore[index]
    with pytest.raises(UsageError, match=r"; use .* or more or --calibrate none \(.*\)$"):
        run(source, tmp_path / "out", time_limit=enough // 3, calibrate="pydoc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="^time_limit is 10 s; reading, seeds, one pass"):
        compress(source, tmp_path / "out", Settings(**SMALL, time_limit=10), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_what_is_done_already_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name in ("key", "gate.scan", "calibration", "plan", "gate.layer-0.fit", "gate.layer-1.joint-3", "up.warm"):
        (folder / f"{name}.json").write_text("{}", encoding="utf-8")
    assert schedule.done_stages(folder, 2) == {
        "gate: scan", "sample", "calibrate", "fisher", "plan", "gate.layer-0: seeds", "gate.layer-0: joint",
        "gate.layer-0: loops", "gate.layer-1: seeds", "up: seeds",
    }  # fmt: skip
    assert schedule.done_stages(tmp_path / "none", 2) == set()
    for layer, whole in ((0, False), (1, True)):
        (folder / f"corrected-{layer}.json").write_text("{}", encoding="utf-8")
        assert ("correct" in schedule.done_stages(folder, 2)) == whole


def test_fits_leave_time_for_corrections() -> None:
    clock, rates = Clock(), Rates(1.0, 1.0, 1.0, 1.0, 1.0)
    fits = [Expected(f"{name}: joint", 30.0, 10.0) for name in ("gate", "up")]
    job: Any = SimpleNamespace(store=SimpleNamespace(names=list), stages=SimpleNamespace(records=[]))
    left = {}
    for correcting in (0.0, 20.0):
        stages = (*fits, Expected("correct", correcting, correcting), Expected("write", 5.0, 5.0))
        timed = schedule.Schedule(Turn(clock() + 100, clock), Estimate(stages, {}, 0, rates))
        left[correcting] = timed.turn_of("gate", job).left
    assert left[0.0] - left[20.0] == pytest.approx(schedule._RESERVED * 20.0 / 2)


def test_a_limit_without_room_for_corrections(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "measured_rates", lambda planned, settings: Rates(1e7, 1e6, 1e7, 1e6, 1e-3))
    calibrated: dict[str, Any] = {"calibrate": "pydoc", "correct": "down"}
    with pytest.raises(UsageError, match="one pass of every fit, corrections and writing are estimated") as refusal:
        run(source, tmp_path / "out", time_limit=10, **calibrated)
    enough = int(re.search(r"--time-limit (\d+)s", str(refusal.value))[1])  # type: ignore[index]
    with pytest.raises(UsageError, match=r"--correct none \(.*\) or --calibrate none --correct none \(.*\)$"):
        run(source, tmp_path / "out", time_limit=int(enough / 1.4), **calibrated)


def test_a_stopped_run_goes_on_under_a_limit_of_its_own(
    source: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compressing, "write_weights", None)  # all is fitted
        with pytest.raises(TypeError):
            run(source, tmp_path / "out", time_limit=200)
    clock.tick(1e6)
    result, _ = run(source, tmp_path / "out", time_limit=150)
    stages = {stage["name"]: stage["resumed"] for stage in result.metrics["stages"]}
    assert stages["gate: joint"] and stages["up: joint"] and result.metrics["settings"]["time_limit"] == 150
    assert all(found["joint"]["stopped"] == "time_limit" for found in result.metrics["families"].values())
    with pytest.raises(UsageError, match=r"a finished output .* settings.time_limit \(found 150.*, expected null\)"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", time_limit=150)[0].found


def test_a_fit_that_was_stopped_has_all_of_the_new_limit(
    source: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[str] = []

    def stop(*given: Any) -> None:
        saves.append("")
        if len(saves) == 2:
            raise KeyboardInterrupt

    from globe.fit import joint

    saved = joint.save_joint
    with monkeypatch.context() as patch:
        patch.setattr(joint, "save_joint", lambda *given: (saved(*given), stop()))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", time_limit=300)
    began = clock()
    result, _ = run(source, tmp_path / "out", time_limit=300)
    gate = result.metrics["families"]["gate"]["joint"]
    assert gate["stopped"] == "time_limit" and gate["steps"] > 2
    assert began + 150 < clock() <= began + 300
    assert np.all(np.diff([line["error"] for line in gate["history"]][1:]) <= 0)


def test_stages_that_took_longer_reserve_more() -> None:
    from globe.choice.estimate import Estimate, Expected

    expected = Estimate((Expected("calibrate", 10.0, 10.0), Expected("gate: joint", 100.0, 9.0)), {}, 0, FAST)
    took = [Stage("calibrate", 40.0, 0, 0), Stage("gate: joint", 9999.0, 0, 0), Stage("index", 9.0, 0, 0)]
    assert schedule._slowness(expected, took) == pytest.approx(41 / 11)
    assert schedule._slowness(expected, [replace(took[0], resumed=True)]) == 1.0


def test_plans_and_options_take_it(source: Path, clock: Clock, tmp_path: Path) -> None:
    plan = {"jobs": [{"model": str(source), "out": "out", "settings": {**SMALL, "time_limit": "5m"}}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    (outcome,) = batch(tmp_path / "plan.yaml")
    assert outcome.status == "done" and outcome.metrics is not None
    assert outcome.metrics["settings"]["time_limit"] == 300
    refused = CliRunner().invoke(cli, ["compress", str(source), str(tmp_path / "new"), "--time-limit", "soon"])
    assert refused.exit_code != 0 and "time_limit is 'soon'; expected seconds or a time such as" in str(
        refused.exception
    )


def test_the_estimate_of_a_run_names_its_stages(source: Path, tmp_path: Path) -> None:
    """Every stage that a run has is one that was expected, in its order, but for the index."""
    for changed in ({}, {"solver": "alternate"}, {"ratio": 0.6, "rank": 0.75, "bank_size": None}):
        settings = Settings(**{**SMALL, "joint_steps": 1, "outer_loops": 1, **changed})
        done = CliRunner().invoke(
            cli, ["inspect", str(source), "--estimate", "--json", "--config", str(_yaml(tmp_path, settings))]
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["estimate"]
        lines = Lines()
        compress(source, tmp_path / f"out-{len(changed)}", settings, progress=lines)
        assert [stage["name"] for stage in found["stages"]] == [name for name in lines.stages if name != "index"]
        assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
        assert found["peak_bytes"] == max(found["peaks"].values()) > 1 << 29 and found["scratch_bytes"] == 0
        assert found["device"] == "cpu" and found["threads"] == 1 and found["gflops"] > 0


def _yaml(folder: Path, settings: Settings) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings.as_dict()), encoding="utf-8")
    return path
