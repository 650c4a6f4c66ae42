"""The histories in trackers: TensorBoard as it is, the others by stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from checkpoints import make_tiny
from globe import Settings, compress
from globe.errors import UsageError
from globe.pipeline.compress import Result
from globe.runs.tracking import TENSORBOARD_FOLDER, points, track
from refusals import SMALL, refusal


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    home = tmp_path_factory.mktemp("tracking")
    settings = Settings(rank=0.5, bank_size=3, joint_steps=4, device="cpu", calibrate="none")
    return compress(make_tiny("olmoe", home / "source"), home / "out", settings)


def test_points_are_those_of_the_metrics(result: Result) -> None:
    found, families = points(result.metrics), result.metrics["families"]
    assert list(found) == sorted(found)
    for name, family in families.items():
        assert family["history"] == [] and len(family["joint"]["history"]) > 2
        for record in family["joint"]["history"]:
            assert found[record["step"]][f"{name}/joint/error"] == record["error"]
            assert found[record["step"]][f"{name}/joint/iterations"] == record["iterations"]
        assert found[max(found)][f"final/{name}/relative_error"] == family["relative_error"]
    assert found[max(found)]["final/ratio/touched"] == result.ratio.touched


def test_points_are_those_of_the_loops(result: Result, tmp_path: Path) -> None:
    settings = Settings(**{**result.metrics["settings"], "solver": "alternate", "outer_loops": 2})
    metrics = compress(result.directory.parent / "source", tmp_path / "out", settings).metrics
    found = points(metrics)
    for name, family in metrics["families"].items():
        assert [record["loop"] for record in family["history"]] == [1, 2] and "joint" not in family
        for record in family["history"]:
            assert found[record["loop"]][f"{name}/loops/relative_error"] == record["relative_error"]


def test_pools_and_runs_without_loops() -> None:
    family: dict[str, Any] = {"relative_error": 0.5, "history": [], "support_median": 2}
    metrics = {
        "families": {"gate": {"relative_error": 0.5}},
        "pools": {"gate.layer-0": family},
        "ratio": {"touched": 0.7},
    }
    assert points(metrics) == {0: {"final/gate/relative_error": 0.5, "final/ratio/touched": 0.7}}


def test_tensorboard(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second replaces the first
        track("tensorboard", tmp_path, result.metrics)
    assert len(list((tmp_path / TENSORBOARD_FOLDER).iterdir())) == 1
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    expected = {
        (key, step): value for step, figures in points(result.metrics).items() for key, value in figures.items()
    }
    found = {(key, event.step): event.value for key in events.Tags()["scalars"] for event in events.Scalars(key)}
    assert found == pytest.approx(expected, rel=1e-6)


class Recorder(ModuleType):
    """trackio and wandb as far as they are used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: dict[str, Any] = {}
        self.logged: dict[int, dict[str, float]] = {}
        self.ended = False

    def init(self, **about: Any) -> SimpleNamespace:
        self.begun = about
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged[step] = figures

    def finish(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_finished_output_is_logged(name: str, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    source, settings = result.directory.parent / "source", Settings(**result.metrics["settings"])
    assert compress(source, result.directory, settings, log=name).found
    assert recorder.begun == {"project": "globe", "name": "out", "config": result.metrics["settings"]}
    assert recorder.logged == points(result.metrics) and list(recorder.logged) == sorted(recorder.logged)
    assert recorder.ended


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_an_absent_package_is_said_before_anything_else(
    name: str, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    source = result.directory.parent / "source"
    assert f'pip install "globe-moe[{name}]"' in refusal(1, "compress", source, tmp_path / "out", *SMALL, "--log", name)
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_leaves_a_whole_output(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    source, settings = result.directory.parent / "source", Settings(**result.metrics["settings"])
    with pytest.raises(Exception, match="is finished, but --log wandb failed"):
        compress(source, result.directory, settings, log="wandb")


def test_an_unknown_tracker(result: Result, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trackio, wandb, tensorboard"):
        compress(result.directory.parent / "source", tmp_path / "out", log="paper")
