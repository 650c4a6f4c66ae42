"""A name on the hub in place of a directory: what is fetched, what is not, and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress  # noqa: E402
from globe.checkpoint.hub import headers, local  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.choice.inspect import inspect  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.pipeline.batch import read_plan  # noqa: E402
from hub_files import COMMIT, Served, serving  # noqa: E402

SMALL = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, with what repositories hold beside."""
    found = make_tiny("olmoe", tmp_path_factory.mktemp("hub") / "source", shards=2)
    shutil.copy(next(found.glob("model-*.safetensors")), found / "consolidated.safetensors")
    (found / "onnx").mkdir()
    (found / "onnx" / "model.json").write_text("{}")
    (found / "pytorch_model.bin").write_bytes(b"not needed")
    beside = ("chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer.model", "modeling_own.py",
              "preprocessor_config.json", "generation_config.json")  # fmt: skip
    for name in beside:
        (found / name).parent.mkdir(exist_ok=True)
        (found / name).write_text("{}")
    return found


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving({"org/tiny": source}) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def test_only_what_is_needed_is_fetched_and_once(hub: Served, source: Path) -> None:
    found = local("org/tiny")
    names = {path.name for path in found.rglob("*")}
    left = {"consolidated.safetensors", "onnx", "model.json", "pytorch_model.bin"}
    assert names == {path.name for path in source.rglob("*")} - left
    for name in (path.relative_to(found) for path in found.rglob("*") if path.is_file()):
        assert (found / name).read_bytes() == (source / name).read_bytes()
    sent = dict(hub.sent)
    assert local("org/tiny@v1") == found and hub.sent == sent


def test_a_name_is_compressed_as_its_directory_is(hub: Served, source: Path, tmp_path: Path) -> None:
    named, placed = compress("org/tiny", tmp_path / "named", SMALL), compress(source, tmp_path / "placed", SMALL)
    for path in placed.directory.glob("*.safetensors"):
        assert (named.directory / path.name).read_bytes() == path.read_bytes()
    assert COMMIT in json.loads((named.directory / "globe.json").read_text())["source"]["path"]
    assert "base_model: org/tiny" in (named.directory / "README.md").read_text()


def test_inspect_fetches_no_weights(hub: Served, source: Path) -> None:
    found, there = inspect("org/tiny"), inspect(source)
    for key in ("families", "bytes", "choices", "layout", "shards"):
        assert found[key] == there[key]
    assert found["model"] == "org/tiny"
    weights = sum(path.stat().st_size for path in source.glob("model-*.safetensors"))
    read = sum(size for name, size in hub.sent.items() if name.endswith(".safetensors"))
    assert 0 < read < weights or read <= 2 * 100_001  # the hub's own first guess of a header's size
    with headers("org/tiny") as folder:
        held = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors"))
        assert Checkpoint(folder).layout.name == "olmoe" and held < weights
    assert not folder.exists()


def test_a_directory_comes_first(hub: Served, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert local("org/tiny") == Path("org/tiny") and not hub.requests
    assert local(source) == source and local("none") == Path("none")


@pytest.mark.parametrize("name", ["org/none", "org/tiny@none"])
def test_what_is_not_there(name: str, hub: Served, tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match=rf"^{name}: no such directory, and it could not be fetched .*404.*name$"):
        local(name)
    with pytest.raises(GlobeError, match=rf"^{name}: no such directory, and it could not be fetched .*check the name"):
        inspect(name)
    with pytest.raises(GlobeError, match="could not be fetched"):
        compress(name, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_no_hub_there(hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(GlobeError, match=r"^org/tiny: .*; check the name and the connection; what was fetched is kept"):
        local("org/tiny")


def test_offline_takes_what_the_cache_has(hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    found = local("org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert local("org/tiny") == found and not hub.requests
    assert inspect("org/tiny")["families"] == inspect(found)["families"] and not hub.requests
    for take in (local, inspect):
        with pytest.raises(GlobeError, match=r"^org/other: .*could not be fetched"):
            take("org/other")


@pytest.mark.parametrize("weights", ["in the cache", "not there"])
def test_inspect_of_a_hub_that_is_not_to_be_reached(weights: str, hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    told = inspect("org/tiny")
    if weights == "in the cache":
        local("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if weights == "in the cache":
        assert inspect("org/tiny") == told
        return
    with pytest.raises(GlobeError, match=r"^org/tiny: .*; check the name and the connection"):
        inspect("org/tiny")


def test_quiet_commands_show_nothing_of_what_they_fetch(hub: Served, tmp_path: Path) -> None:
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    for command in (("inspect", "org/tiny", "-q"), ("eval", "org/tiny", "--max-tokens", "64", "-q")):
        done = subprocess.run(
            [sys.executable, "-m", "globe", *command],
            capture_output=True,
            text=True,
            env={**os.environ, **places},
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_huggingface_hub_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(
        GlobeError, match=r'install huggingface_hub .*globe-moe\[hub\]"\), or fetch it with `hf download'
    ):
        local("org/tiny")


def test_a_batch_takes_names(hub: Served, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("jobs:\n- {model: org/tiny, out: out, settings: {rank: 0.5, bank_size: 3}}\n")
    (job,) = read_plan(plan)
    assert job.model == local("org/tiny") and job.out == tmp_path / "out"
