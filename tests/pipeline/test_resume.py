"""Runs that were killed go on to the same bytes; what changed or was damaged meanwhile is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.pipeline.compress import Result, compress  # noqa: E402
from globe.runs.store import FOLDER, RunStore  # noqa: E402
from globe.settings import Settings  # noqa: E402
from killed import Killer  # noqa: E402
from refusals import cut, edit_tensor, flip, in_process  # noqa: E402
from trips import digests  # noqa: E402

SMALL: dict[str, Any] = {
    "rank": 0.5,
    "bank_size": 4,
    "outer_loops": 4,
    "method": "ts-pca",
    "support": 2,
    "patience": 100,
    "device": "cpu",
    "threads": 1,
    **WEIGHTS_ONLY,
}
SAVE = "globe.runs.store:RunStore.save"


def run(source: Path, out: Path, **changed: Any) -> tuple[Result, Lines]:
    lines = Lines()
    options = {key: changed.pop(key) for key in ("fresh", "keep_run", "overwrite") if key in changed}
    return compress(source, out, Settings(**{**SMALL, **changed}), progress=lines, **options), lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose run was not interrupted."""
    return run(source, tmp_path_factory.mktemp("whole") / "out")[0].directory


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as running:
        yield running


def check_whole(out: Path, whole: Path) -> None:
    assert digests(out) == digests(whole)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in whole.iterdir())
    ours, theirs = (json.loads((place / "metrics.json").read_text(encoding="utf-8")) for place in (out, whole))
    assert [stage["name"] for stage in ours["stages"]] == [stage["name"] for stage in theirs["stages"]]
    for metrics in (ours, theirs):
        metrics.pop("stages")
        for family in metrics["families"].values():
            del family["init"]["seconds"], family["init"]["peak_rss_bytes"]
            for record in family["history"]:
                record.pop("seconds")
    assert ours == theirs


# Saves: 1, 2 the scans; 3 to 7 the states of gate's loops; 8 its factors; 9 its error on proxies; 10 to 16 the same
# of up; 17, 18 the shards.
PLACES: dict[str, dict[str, Any]] = {
    "before anything": {"place": SAVE, "entered": True},
    "in the second scan": {"place": "globe.seeds.proxies:scan", "call": 2, "entered": True},
    "seeds done": {"place": SAVE, "call": 3},
    "in a loop": {"place": "globe.fit.training:sweep", "call": 3, "entered": True},
    "while a state is written": {"place": "globe.runs.store:_pieces", "call": 12},
    "tensors written, their manifest not": {"place": "globe.runs.store:_digest", "call": 6, "entered": True},
    "gate done": {"place": SAVE, "call": 8},
    "before the error on proxies": {"place": "globe.fit.stages:proxy_error"},
    "up's last loop": {"place": SAVE, "call": 14},
    "first shard half written": {"place": "globe.fit.stored_lefts:squared_errors", "call": 5},
    "first shard written and not recorded": {"place": SAVE, "call": 17, "entered": True},
    "second shard written": {"place": SAVE, "call": 18},
    "bank written": {"place": "globe.artifact.write:_write_bank"},
    "all but config.json": {"place": "globe.pipeline.closing:model_card"},
}


@pytest.mark.parametrize("at", PLACES)
def test_killed_at_a_chosen_place(at: str, killer: Killer, source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killer.run(source, out, SMALL, **PLACES[at]) == -9
    assert not (out / "config.json").exists() and (out / FOLDER).is_dir()
    saved = {path.stem for path in (out / FOLDER).glob("*.json")} - {"key"}
    result, lines = run(source, out)
    check_whole(out, whole)
    assert not result.found
    stages = {stage["name"]: stage["resumed"] for stage in result.metrics["stages"]}
    for name, stage in (("gate.scan", "gate: scan"), ("gate.fit", "gate: loops"), ("up.proxies", "up: proxies")):
        if name in saved:
            assert stages[stage] and stage not in lines.stages


def test_killed_again_and_again(killer: Killer, source: Path, whole: Path, tmp_path: Path) -> None:
    """Every attempt ends with its second save: the run is over after a bounded number of them."""
    out = tmp_path / "out"
    attempts = 0
    while killer.run(source, out, SMALL, place=SAVE, call=2) == -9:
        attempts += 1
        assert attempts < 20
    assert attempts == 9
    check_whole(out, whole)


def test_killed_between_seeds_and_their_spread_codes(killer: Killer, source: Path, tmp_path: Path) -> None:
    """Grouped subspaces have one state more: 3 the seeds, 4 the first loop's."""
    settings = {**SMALL, "method": "grouped-subspace", "families": ["gate"]}
    whole = run(source, tmp_path / "whole", method="grouped-subspace", families=("gate",))[0].directory
    for place in ({"call": 2}, {"call": 3}, {"call": 4}, {"call": 3, "entered": True}):
        out = tmp_path / f"out-{len(place)}-{place['call']}"
        assert killer.run(source, out, settings, place=SAVE, **place) == -9
        run(source, out, method="grouped-subspace", families=("gate",))
        check_whole(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("loops", "shards"), [(30, 2), (1, 12)], ids=["mostly loops", "mostly writing"])
def test_killed_at_twenty_random_moments(loops: int, shards: int, killer: Killer, tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source", shards=shards)
    settings = {**SMALL, "outer_loops": loops, "tolerance": 0.0}
    took = math.inf
    for _ in range(2):
        started = time.perf_counter()
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        assert killer.run(source, tmp_path / "whole", settings) == 0
        took = min(took, time.perf_counter() - started)
    rng, places, kills, runs = random.Random(loops), set[str](), 0, 0
    while kills < 10:
        out, before, runs = tmp_path / f"out{runs}", kills, runs + 1
        while killer.run(source, out, settings, seconds=rng.uniform(0.02, 1) * took) == -9:
            kills += 1
            places.update(path.stem for path in (out / FOLDER).glob("*.json"))
        if kills > before:
            check_whole(out, tmp_path / "whole")
    print(f"{kills} kills in {runs} runs of {took:.2f} s; results that were there: {sorted(places)}")


def unfinished(killer: Killer, source: Path, out: Path, call: int) -> Path:
    """An output whose run was killed after so many saves."""
    assert killer.run(source, out, SMALL, place=SAVE, call=call) == -9
    return out


@pytest.mark.parametrize(
    ("call", "damages", "told"),
    [
        (6, {"gate.loop-3.safetensors": 0.9}, "gate.loop-3"),
        (6, {"gate.loop-3.json": 0.5}, "gate.loop-3"),
        (6, {"gate.loop-3.safetensors": None, "gate.loop-2.safetensors": 0.6}, "gate.loop-2"),
        (6, {"gate.loop-2.json": None, "up.scan.safetensors": 0.05}, "up.scan"),
        (9, {"gate.fit.safetensors": 1.0, "gate.proxies.json": 0.0}, "gate.fit"),
        (18, {"../globe-00001-of-00002.safetensors": 0.7}, "globe-00001-of-00002"),
        (18, {"../globe-00002-of-00002.safetensors": None, "shard-0.json": 0.3}, "globe-00002-of-00002"),
    ],
)
def test_damage_is_noticed_and_made_good(
    call: int, damages: dict[str, float | None], told: str, killer: Killer, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = unfinished(killer, source, tmp_path / "out", call)
    for name, at in damages.items():
        cut(out / FOLDER / name) if at is None else flip(out / FOLDER / name, at)
    _, lines = run(source, out)
    assert any(told in line and ("damaged" in line or "written again" in line) for line in lines.lines), lines.lines
    check_whole(out, whole)


def test_results_of_a_run_that_lost_its_key_are_not_used(
    killer: Killer, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = unfinished(killer, source, tmp_path / "out", 8)
    (out / FOLDER / "key.json").write_text('{"key": 3', encoding="utf-8")
    _, lines = run(source, out)
    assert any("gate.fit" in line and "done again" in line for line in lines.lines)
    assert "gate: loops" in lines.stages
    check_whole(out, whole)


def test_another_setting_is_refused_with_what_differs(
    killer: Killer, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = unfinished(killer, source, tmp_path / "out", 8)
    (out / ".globe-lock").unlink()
    before = sorted(out.rglob("*"))
    with pytest.raises(UsageError, match="unfinished run") as refused:
        run(source, out, rank=0.25, families=("gate",))
    line = str(refused.value)
    assert str(out) in line and "settings.rank (found 0.5, expected 0.25)" in line and "--fresh" in line
    assert 'settings.families (found ["gate", "up"], expected ["gate"])' in line and "bank_size" not in line
    assert sorted(out.rglob("*")) == before
    _, lines = run(source, out)  # the run itself is unharmed
    assert "gate: loops" not in lines.stages
    check_whole(out, whole)
    with pytest.raises(UsageError, match=r"a finished output .*settings.seed \(found 0, expected 1\).*--fresh"):
        run(source, out, seed=1)
    check_whole(out, whole)
    assert run(source, out, seed=1, fresh=True)[0].metrics["settings"]["seed"] == 1


def test_another_source_is_refused(killer: Killer, source: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "source"))
    out = unfinished(killer, changed, tmp_path / "out", 8)
    edit_tensor(changed, "model.layers.0.mlp.experts.3.up_proj.weight", lambda tensor: tensor * 2)
    with pytest.raises(UsageError, match=r"source.fingerprint \(found \"\w+….*--fresh"):
        run(changed, out)
    fresh, lines = run(changed, out, fresh=True)
    assert not any(stage["resumed"] for stage in fresh.metrics["stages"]) and "gate: loops" in lines.stages
    edit_tensor(changed, "model.norm.weight", lambda tensor: tensor * 2)
    with pytest.raises(UsageError, match="a finished output of another source"):
        run(changed, out)


def test_another_version_is_refused(
    killer: Killer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(killer, source, tmp_path / "out", 3)
    monkeypatch.setattr("globe.pipeline.opening.__version__", "9.9")
    with pytest.raises(UsageError, match=r"globe_version \(found \"[\d.]+\", expected \"9.9\"\)"):
        run(source, out)


def test_another_environment_is_said(killer: Killer, source: Path, tmp_path: Path) -> None:
    out = unfinished(killer, source, tmp_path / "out", 3)
    key = json.loads((out / FOLDER / "key.json").read_text(encoding="utf-8"))
    assert set(key["environment"]) == {"device", "threads", "torch", "blocks", "precision"}
    key["environment"]["torch"] = "1.0"
    (out / FOLDER / "key.json").write_text(json.dumps(key), encoding="utf-8")
    _, lines = run(source, out)
    assert any('torch (found "1.0", expected ' in line and "last bits" in line for line in lines.lines)


def test_a_finished_output_is_left_alone(source: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    result, lines = run(source, out)
    assert result.found and result.metrics == json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert result.ratio.touched == result.metrics["ratio"]["touched"]
    assert lines.stages == ["index"] and any("finished already" in line for line in lines.lines)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times
    bank = out / "globe-bank.safetensors"
    assert result.metrics["files"][bank.name]["sha256"] == hashlib.sha256(bank.read_bytes()).hexdigest()
    cut(bank)
    with pytest.raises(GlobeError, match=r"globe-bank.safetensors: missing or not of .* --fresh"):
        run(source, out)
    assert not run(source, out, fresh=True)[0].found
    check_whole(out, whole)


def test_the_command_line_says_that_it_is_finished(source: Path, tmp_path: Path) -> None:
    sized = ("--rank", "0.5", "--bank-size", "3", "--outer-loops", "0", *WEIGHTS_ONLY_OPTIONS)
    arguments = ("compress", source, tmp_path / "out", *sized)
    first, second = (in_process(*arguments, *more) for more in (("--keep-run", "--json"), ("--json",)))
    assert (first.returncode, second.returncode) == (0, 0)
    told = ["finished already" in " ".join(done.stderr.split()) for done in (first, second)]
    assert told == [False, True]
    assert json.loads(first.stdout) == json.loads(second.stdout)
    third = in_process(*arguments, "--fresh", "-q")
    assert (third.returncode, third.stdout, third.stderr) == (0, "", "")


def test_keep_run(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, keep_run=True)
    assert digests(out) == digests(whole)
    kept = {path.stem for path in (out / FOLDER).glob("*.json")}
    assert kept == {
        "key",
        "shard-0",
        "shard-1",
        *(f"{f}.{r}" for f in ("gate", "up") for r in ("scan", "fit", "proxies")),
    }
    assert not [path for path in out.rglob("*") if "partial" in path.name or "scratch" in path.name]
    run(source, out, keep_run=True)
    assert (out / FOLDER).is_dir()
    (out / "config.json").unlink()  # then all results are there, and only the last files are written
    again, lines = run(source, out, keep_run=True)
    assert lines.stages == ["index", "write"] and all(stage["resumed"] for stage in again.metrics["stages"][1:])
    run(source, out)
    check_whole(out, whole)


def test_fresh_leaves_other_files_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="notes.txt.*--overwrite"):
        run(source, out, fresh=True)
    run(source, out, overwrite=True, outer_loops=0)
    run(source, out, fresh=True, outer_loops=1)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_killed_while_it_clears(source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    unlink = Path.unlink

    def stop(self: Path, missing_ok: bool = False) -> None:
        if self.name == "globe-bank.safetensors":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, fresh=True)
    assert not (out / "config.json").exists() and (out / FOLDER).is_dir()
    run(source, out)
    check_whole(out, whole)


def test_fresh_uses_nothing_of_the_run(killer: Killer, source: Path, whole: Path, tmp_path: Path) -> None:
    for option in ("fresh", "overwrite"):
        out = unfinished(killer, source, tmp_path / option, 18)
        result, lines = run(source, out, **{option: True})
        assert not any(stage["resumed"] for stage in result.metrics["stages"])
        assert {"gate: scan", "up: loops", "write"} <= set(lines.stages)
        check_whole(out, whole)


@pytest.mark.parametrize("call", [1, 3, 5, 8, 18])
def test_full_disk_at_any_save(
    call: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = RunStore.save, iter(range(1, 1000))

    def full(self: RunStore, *arguments: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "save", full)
        with pytest.raises(GlobeError, match="No space left on device") as refused:
            run(source, out)
    if call == 1:
        assert not out.exists()
    else:
        assert "and run the same command again" in str(refused.value)
        assert (out / FOLDER).is_dir() and not (out / "config.json").exists() and not (out / ".globe-lock").exists()
    _, lines = run(source, out)
    assert call == 1 or "gate: scan" not in lines.stages
    check_whole(out, whole)


def test_a_refused_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(source, tmp_path / "source"))
    edit_tensor(bad, "model.layers.1.mlp.experts.7.up_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(GlobeError, match="holds NaN or Inf"):
        run(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_with_too_little_space_is_kept(
    killer: Killer, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(killer, source, tmp_path / "out", 8)
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
        with pytest.raises(GlobeError, match="bytes free, about"):
            run(source, out)
    _, lines = run(source, out)
    assert "gate: loops" not in lines.stages
    check_whole(out, whole)
