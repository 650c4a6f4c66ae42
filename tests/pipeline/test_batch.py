"""Many jobs from a plan: all are checked first, one that fails stops no other, and the plan can be run again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import globe  # noqa: E402
from checkpoints import make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.errors import UsageError  # noqa: E402
from globe.pipeline.batch import Entry, batch_table, read_plan  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.pipeline.dealing import places  # noqa: E402
from globe.runs.store import RunStore  # noqa: E402
from globe.runs.tracking import TENSORBOARD_FOLDER  # noqa: E402
from globe.settings import Settings  # noqa: E402
from refusals import edit_tensor, in_process, refusal  # noqa: E402
from trips import digests  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "rank": 0.5,
    "bank_ratio": 0.2,
    "outer_loops": 1,
    "device": "cpu",
    "threads": 1,
    **WEIGHTS_ONLY,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sound checkpoints and one that holds NaN."""
    home = tmp_path_factory.mktemp("models")
    make_tiny("olmoe", home / "one", shards=2)
    make_tiny("mixtral", home / "two")
    shutil.copytree(home / "one", home / "bad")
    edit_tensor(home / "bad", "model.layers.1.mlp.experts.7.up_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    return home


@pytest.fixture
def home(models: Path, tmp_path: Path) -> Path:
    (tmp_path / "models").symlink_to(models)
    return tmp_path


def write_plan(home: Path, *jobs: dict[str, Any], **more: Any) -> Path:
    plan = home / "plan.yaml"
    plan.write_text(yaml.safe_dump({"defaults": DEFAULTS, "jobs": list(jobs), **more}), encoding="utf-8")
    return plan


THREE = (
    {"model": "models/one", "out": "outs/one"},
    {"model": "models/bad", "out": "outs/bad"},
    {"model": "models/two", "out": "outs/two", "settings": {"bank_size": 2, "families": "up"}},
)


def test_a_failing_job_in_the_middle(home: Path) -> None:
    plan, lines = write_plan(home, *THREE), Lines()
    outcomes = globe.batch(plan, progress=lines)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].error is not None and "holds NaN or Inf" in outcomes[1].error and outcomes[1].metrics is None
    assert any(line.startswith("job 2 of 3 failed: tensor") for line in lines.lines)
    assert not (home / "outs" / "bad").exists()
    assert outcomes[2].metrics is not None and list(outcomes[2].metrics["families"]) == ["up"]
    alone = compress(home / "models" / "two", home / "alone", outcomes[2].job.settings)
    assert digests(home / "outs" / "two") == digests(home / "alone")
    told = outcomes[0].as_dict()
    assert told["ratio"]["touched"] < 1 and set(told["relative_error"]) == {"gate", "up"}
    assert told["experts_per_second"] > 0 and told["gb_per_second"] > 0
    assert json.loads(json.dumps([outcome.as_dict() for outcome in outcomes]))[2]["ratio"] == alone.metrics["ratio"]
    assert batch_table(outcomes).row_count == 3
    again = Lines()
    assert [outcome.status for outcome in globe.batch(plan, progress=again)] == ["found", "failed", "found"]
    assert sum("finished already" in line for line in again.lines) == 2 and "write" not in again.stages


def test_a_stopped_plan_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(home, THREE[0], THREE[2])
    save, saves = RunStore.save, iter(range(1, 100))

    def stop(self: RunStore, *arguments: Any) -> None:
        save(self, *arguments)
        if next(saves) == 16:  # two families in two loops with two shards, then the second job's first results
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            globe.batch(plan)
    assert (home / "outs" / "one" / "config.json").exists()
    assert (home / "outs" / "two" / ".globe-run").is_dir()
    assert [outcome.status for outcome in globe.batch(plan)] == ["found", "resumed"]
    assert [outcome.status for outcome in globe.batch(plan, fresh=True)] == ["done", "done"]


def test_the_command(home: Path) -> None:
    plan = write_plan(home, *THREE)
    done = in_process("batch", plan, "--json", "-q")
    assert done.returncode == 1
    assert done.stderr.startswith("globe: error: 1 of 3 jobs failed") and done.stderr.count("\n") == 1
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["status"] for job in jobs] == ["done", "failed", "done"]
    assert "models/bad" not in str(jobs[1]["ratio"]) and "outs/bad" in done.stderr
    shown = in_process("batch", write_plan(home, THREE[0], THREE[2]), "--keep-run")
    assert shown.returncode == 0
    for word in ("out", "status", "touched", "experts/s", "GB/s", "found", "gate"):
        assert word in shown.stdout


def test_every_job_is_logged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    plan = write_plan(home, THREE[0], THREE[2])
    assert in_process("batch", plan, "-q", "--log", "tensorboard").returncode == 0
    for job in (THREE[0], THREE[2]):
        assert len(list((home / job["out"] / TENSORBOARD_FOLDER).iterdir())) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert 'pip install "globe-moe[wandb]"' in refusal(1, "batch", plan, "--fresh", "--log", "wandb")
    assert [outcome.status for outcome in globe.batch(plan)] == ["found", "found"]


def test_layers_of_settings(home: Path) -> None:
    (home / "base.yaml").write_text("outer_loops: 3\nbank_size: 3\nseed: 5\n", encoding="utf-8")
    jobs = [{"model": "models/one", "out": f"o{i}", "config": "base.yaml", "settings": {"seed": i}} for i in range(2)]
    read = read_plan(write_plan(home, *jobs, {"model": "models/one", "out": str(home / "o2")}))
    changed: dict[str, Any] = {"bank_ratio": None, "bank_size": 3, "outer_loops": 3, "seed": 1}
    expected = Settings(**{**DEFAULTS, **changed})
    assert read[1] == Entry(home / "models" / "one", home / "o1", expected)
    assert read[2].settings == Settings(**DEFAULTS) and read[2].out == home / "o2"


def test_threads_of_one_job_do_not_reach_the_next(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("_AT_FIRST", 2), ("usable_processors", lambda: 2)):
        monkeypatch.setattr(f"globe.compute.devices.{name}", found)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = ({**THREE[0], "settings": {"threads": 1}}, {**THREE[0], "out": "o2", "settings": {"threads": None}})
        outcomes = globe.batch(write_plan(home, *jobs))
        assert [outcome.metrics and outcome.metrics["threads"] for outcome in outcomes] == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


ONE = THREE[0]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"jobs": [ONE, {"model": "models/none", "out": "o"}]}, r"job 2 \(\S*o\): models/none: no such directory"),
        ({"jobs": [ONE, {**ONE, "out": "outs/../outs/one"}]}, r"job 2 \(\S+\): job 1 has the same out"),
        ({"jobs": [ONE, {"model": "models/one"}]}, "job 2: out is None; expected a directory"),
        ({"jobs": [ONE, {**ONE, "out": "o", "setting": {}}]}, r"job 2 \(o\): the job: key 'setting' is unknown"),
        ({"jobs": [{**ONE, "settings": {"ranks": 3}}]}, r"job 1 \(outs/one\): config key 'ranks' is not a setting"),
        ({"jobs": [{**ONE, "settings": {"rank": 99}}]}, r"job 1 .*rank is 99, which is 99 rows"),
        ({"jobs": [{**ONE, "settings": [1]}]}, r"settings is \[1\]; expected settings"),
        ({"jobs": [{**ONE, "config": "none.yaml"}]}, r"job 1 .*config \S+none.yaml: cannot be read"),
        ({"jobs": [{**ONE, "config": 3}]}, "config is 3; expected a YAML file"),
        ({"jobs": [{**ONE, "out": "models/one"}]}, "out is the model's own directory"),
        ({"jobs": [3]}, "job 1: found 3; expected model, out"),
        ({"jobs": []}, "jobs is .*expected a list of jobs"),
        ({"jobs": {"a": 1}}, "expected a list of jobs"),
        ({"jobs": [ONE], "default": {}}, "key 'default' is unknown; expected jobs, defaults"),
        ({"jobs": [ONE], "defaults": [1]}, "defaults is .*expected settings"),
        ([1], "plan .*expected keys and values, found list"),
    ],
)
def test_refused_plans(plan: Any, told: str, home: Path) -> None:
    path = home / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    with pytest.raises(UsageError, match=told):
        globe.batch(path)
    assert sorted(entry.name for entry in home.iterdir()) == ["models", "plan.yaml"]


def test_a_plan_that_is_no_file(home: Path) -> None:
    assert "cannot be read as YAML" in refusal(2, "batch", home / "none.yaml")
    (home / "plan.yaml").write_text("jobs: [\n", encoding="utf-8")
    assert "cannot be read as YAML" in refusal(2, "batch", home / "plan.yaml")


def test_errors_of_any_kind_are_outcomes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of\n memory")

    monkeypatch.setattr(sys.modules["globe.pipeline.batch"], "compress", broken)
    outcomes = globe.batch([Entry(home / "models" / "one", home / "o", Settings(**DEFAULTS))])
    assert outcomes[0].error == "RuntimeError: out of memory"


@pytest.mark.slow
def test_dealt_to_places(home: Path) -> None:
    """Jobs in processes of their own, two at a time: what they make, and what is told of one that fails."""
    plan, lines = write_plan(home, *THREE), Lines()
    outcomes = globe.batch(plan, devices="cpu", jobs_per_device=2, progress=lines)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert "experts.7.up_proj.weight" in (outcomes[1].error or "")
    assert sorted(lines.lines)[0].startswith("job 1 of 3 done")
    compress(home / "models" / "one", home / "alone", Settings(**DEFAULTS))
    assert digests(home / "alone") == digests(home / "outs" / "one")
    again = globe.batch(plan, devices="cpu")
    assert [outcome.status for outcome in again] == ["found", "failed", "found"]


@pytest.mark.parametrize(
    ("devices", "count", "said"),
    [("cpu,cpu", 1, "each once"), ("cuda:99", 1, "'cuda:99' is not here"), ("cpu", 0, "jobs_per_device is 0")],
)
def test_places_that_are_none(devices: str, count: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        places(devices, count)
