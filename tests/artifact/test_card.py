"""The model card, as the hub's own package reads it, and the settings that reproduce a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

from checkpoints import make_tiny  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.artifact.card import base_model  # noqa: E402
from globe.artifact.run_directory import finished_key  # noqa: E402
from globe.checkpoint.companions import SETTINGS_FILE  # noqa: E402
from globe.settings.yaml_file import read_settings  # noqa: E402
from refusals import in_process  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("card")
    source = make_tiny("olmoe", home / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: x\n---\n# OLMoE\n")
    (source / SETTINGS_FILE).write_text("rank: 0.1\n")  # of another run: not copied
    settings = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", calibrate="none", mod_ridge=1e-6)
    compress(source, home / "out", settings)
    return home


def test_the_hub_reads_the_card(home: Path) -> None:
    card = hub.ModelCard.load(home / "out" / "README.md")
    data, metrics = card.data, json.loads((home / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert data.base_model == "source" and data.base_model_relation == "quantized"
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert data.library_name == "transformers" and "globe" in data.tags
    found = {(result.metric_type, result.metric_name): result.metric_value for result in data.eval_results}
    for name, family in metrics["families"].items():
        key = ("relative_error", f"relative error, {name}")
        assert found[key] == pytest.approx(family["relative_error"], abs=1e-6)
    for axis, share in metrics["ratio"].items():
        assert found["stored_over_dense", f"stored over dense, {axis}"] == pytest.approx(share, abs=1e-6)
    assert f"globe compress MODEL OUT --config {SETTINGS_FILE}" in card.text


def test_the_settings_reproduce_the_run(home: Path) -> None:
    out, file = home / "out", home / "out" / SETTINGS_FILE
    stated = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["settings"]
    assert read_settings(file, {}).as_dict() == stated
    done = in_process("compress", home / "source", home / "again", "--config", file, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert finished_key(home / "again") == finished_key(out) is not None
    for weights in out.glob("*.safetensors"):
        assert (home / "again" / weights.name).read_bytes() == weights.read_bytes()
    assert (home / "again" / SETTINGS_FILE).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.6, "families": ["gate", "up", "down"], "scope": 2, "share_families": True},
        {"bank_ratio": 0.25, "max_memory": "3GiB", "threads": 2, "rank": 288},
    ],
)
def test_all_kinds_of_settings_return(settings: dict[str, object], tmp_path: Path) -> None:
    from globe.artifact.card import settings_file

    wanted = Settings(**settings)  # type: ignore[arg-type]
    about = {"globe_version": "0", "source": {"fingerprint": "f"}, "threads": 1, "device": "cpu"}
    (tmp_path / "settings.yaml").write_text(settings_file({**about, "settings": wanted.as_dict()}))
    assert read_settings(tmp_path / "settings.yaml", {}) == wanted


def test_an_export_leaves_the_card_and_the_settings(home: Path) -> None:
    export(home / "out", home / "dense")
    assert not {"README.md", SETTINGS_FILE} & {file.name for file in (home / "dense").iterdir()}


@pytest.mark.parametrize(
    ("folder", "told", "expected"),
    [
        ("models--Qwen--Qwen1.5-MoE-A2.7B/snapshots/0a1b", None, "Qwen/Qwen1.5-MoE-A2.7B"),
        ("model", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("model", "/home/someone/model", "model"),
        ("model", "../models/olmoe", "model"),
        ("model", None, "model"),
    ],
)
def test_base_model(folder: str, told: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert base_model(tmp_path / folder, {"_name_or_path": told}) == expected


def test_the_card_tells_of_the_texts(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    settings = Settings(rank=0.5, bank_size=3, joint_steps=1, device="cpu", calibrate="auto", calibration_tokens=1024)
    result = compress(source, tmp_path / "out", settings)
    texts = result.metrics["calibration"]["texts"]
    assert [text["tokens"] for text in texts if text["name"] == "self"] == [512]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| samples of the model itself | 512 | 50.0% |" in card and "| pydoc:topics | 512 | 50.0% |" in card
