"""`globe push` against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
hub_package = pytest.importorskip("huggingface_hub")

from checkpoints import make_tiny  # noqa: E402
from fake_hub import Hub, fake_hub  # noqa: E402
from globe import Settings, compress  # noqa: E402
from globe.artifact.push import push  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from refusals import command, refusal  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("push")
    source = make_tiny("olmoe", home / "source", shards=2)
    settings = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", calibrate="none")
    compress(source, home / "out", settings, keep_run=True)
    return home / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_package.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with fake_hub() as hub:
        yield hub


def visible(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if not file.name.startswith(".")}


def test_the_command_uploads_every_file_in_one_commit(out: Path, hub: Hub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_right"}
    line = command("push", out, "someone/olmoe-globe", "--private", "--json")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "repository": "someone/olmoe-globe",
        "commit": f"{hub.endpoint}/someone/olmoe-globe/commit/{'1' * 40}",
    }
    assert (out / ".globe-run").is_dir()
    assert hub.files == visible(out)
    assert set(hub.commits) == {"main"}
    assert hub.created["name"] == "olmoe-globe" and hub.created["organization"] == "someone"
    assert hub.created.get("visibility") == "private" or hub.created.get("private") is True
    assert {"globe-bank.safetensors", "config.json", "README.md", "modeling_globe.py"} <= set(hub.files)


def test_a_branch_of_a_repository_that_exists(out: Path, hub: Hub) -> None:
    hub.exists = True
    address = push(out, "someone/olmoe-globe", revision="rank-0.5", endpoint=hub.endpoint, message="Half the rank")
    assert address.startswith(hub.endpoint)
    assert hub.branches == ["rank-0.5"]
    assert hub.commits["rank-0.5"]["summary"] == "Half the rank"
    assert hub.files == visible(out)


def test_a_wrong_token(out: Path, hub: Hub) -> None:
    hub.token = "hf_another"
    with pytest.raises(GlobeError, match="HF_TOKEN or run `hf auth login`"):
        push(out, "someone/olmoe-globe", endpoint=hub.endpoint)
    assert not hub.files


@pytest.mark.parametrize("name", ["a/b/c", "name with spaces", "--"])
def test_no_name_of_a_repository(out: Path, hub: Hub, name: str) -> None:
    with pytest.raises(UsageError, match="NAMESPACE/NAME"):
        push(out, name, endpoint=hub.endpoint)
    assert not hub.requests


def test_unfinished_and_dense_directories_are_refused(out: Path, hub: Hub, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(out, tmp_path / "unfinished"))
    (unfinished / "config.json").unlink()
    assert "did not finish" in refusal(1, "push", unfinished, "someone/olmoe-globe")
    truncated = Path(shutil.copytree(out, tmp_path / "truncated"))
    (truncated / "globe-bank.safetensors").unlink()
    assert "globe-bank" in refusal(1, "push", truncated, "someone/olmoe-globe")
    assert "globe.json" in refusal(1, "push", out.parent / "source", "someone/olmoe-globe")
    assert not hub.requests


def test_no_hub_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(GlobeError, match=r"someone/olmoe-globe: the upload failed"):
        push(out, "someone/olmoe-globe", endpoint="http://127.0.0.1:9")


def test_huggingface_hub_absent(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GlobeError, match=r"globe-moe\[hub\]"):
        push(out, "someone/olmoe-globe")
