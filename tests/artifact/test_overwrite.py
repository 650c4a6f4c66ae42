"""`--overwrite` takes away what GloBE wrote, finished or not, and nothing of anyone else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.artifact.export import export  # noqa: E402
from globe.artifact.owned import recorded  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.runs.store import FOLDER  # noqa: E402
from globe.settings import Settings  # noqa: E402
from killed import Killer  # noqa: E402
from refusals import SMALL, edit_json, refusal  # noqa: E402
from trips import digests  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", threads=1, **WEIGHTS_ONLY)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=3)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("mixtral") / "source")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("finished") / "out", SETTINGS).directory


@pytest.fixture(scope="module")
def calibration(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_tiny(source, tmp_path_factory.mktemp("calibration") / "stats.safetensors").path


def add_others(directory: Path) -> dict[str, bytes]:
    """Files of somebody else, and what they hold."""
    directory.mkdir(exist_ok=True)
    (directory / "lora").mkdir()
    save_file({"lora_A": torch.ones(2, 2)}, directory / "adapter_model.safetensors")
    save_file({"x": torch.ones(3)}, directory / "lora" / "globe.safetensors")
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    (directory / "other.safetensors.index.json").write_text("{}", encoding="utf-8")
    (directory / ".mine.partial").write_text("mine", encoding="utf-8")
    return held(directory)


def held(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def test_compress_keeps_the_files_of_others(source: Path, finished: Path, single: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    others = add_others(tmp_path / "others")
    shutil.copytree(tmp_path / "others", out, dirs_exist_ok=True)
    lines = Lines()
    compress(single, out, SETTINGS, overwrite=True, progress=lines)
    assert others.items() <= held(out).items()
    assert set(held(out)) - set(others) == set(held(compress(single, tmp_path / "alone", SETTINGS).directory))
    assert digests(tmp_path / "alone").items() <= digests(out).items()
    told = next(line for line in lines.lines if "left as they are" in line)
    assert "adapter_model.safetensors" in told and "notes.txt" in told and "lora/" in told
    assert "globe-bank" not in told
    compress(source, out, SETTINGS, fresh=True)  # the same for --fresh
    assert others.items() <= held(out).items()
    assert set(held(out)) - set(others) == set(held(finished))


def test_export_keeps_the_files_of_others(finished: Path, single: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    others = add_others(dense)
    (dense / "README.md").write_text("mine", encoding="utf-8")
    export(finished, dense, overwrite=True)
    first = set(held(dense))
    assert others.items() <= held(dense).items() and (dense / "README.md").read_text(encoding="utf-8") == "mine"
    export(compress(single, tmp_path / "two", SETTINGS).directory, dense, overwrite=True)
    assert others.items() <= held(dense).items()
    gone = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)} | {"model.safetensors.index.json"}
    assert first - set(held(dense)) == gone  # what the first export's index names


def test_a_file_that_would_be_loaded_instead_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file({"x": torch.ones(3)}, dense / "model.safetensors")
    before = held(dense)
    with pytest.raises(UsageError, match=r"model.safetensors is not GloBE's .* instead of the files that .*index.json"):
        export(finished, dense, overwrite=True)
    assert held(dense) == before


def test_an_export_takes_the_place_of_a_factored_output(finished: Path, single: Path, tmp_path: Path) -> None:
    place = compress(single, tmp_path / "place", SETTINGS).directory
    export(finished, place, overwrite=True)
    assert not [name for name in held(place) if name.startswith(("globe", "metrics", "modeling_globe", "README"))]


@pytest.mark.parametrize("what", ["compress", "export"])
def test_the_refusal_lists_what_would_go_and_what_would_stay(
    what: str, source: Path, finished: Path, single: Path, tmp_path: Path
) -> None:
    out = compress(single, tmp_path / "out", SETTINGS).directory
    (out / "adapter_model.safetensors").write_bytes(b"mine")
    before = held(out)
    arguments = ("compress", source, out, *SMALL) if what == "compress" else ("export", finished, out)
    line = refusal(2, *arguments)
    stays, goes = line.partition("would stay: ")[2].split("; would go: ")
    assert stays == "adapter_model.safetensors"
    assert "config.json" in goes and "globe-bank.safetensors" in goes and "more" in goes
    assert ("--fresh" if what == "compress" else "--overwrite") in line and held(out) == before


@pytest.mark.parametrize("name", ["cal.safetensors", "sub/cal.safetensors"])
def test_a_calibration_inside_out_is_read_and_kept(
    name: str, source: Path, finished: Path, calibration: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    file = out / name
    file.parent.mkdir(exist_ok=True)
    shutil.copyfile(calibration, file)
    settings = Settings(**{**SETTINGS.as_dict(), "families": ("gate",), "calibrate": str(file)})
    result = compress(source, out, settings, overwrite=True)
    assert result.metrics["calibration"] is not None and file.read_bytes() == calibration.read_bytes()


@pytest.mark.parametrize("name", ["globe.safetensors", "globe-00002-of-00003.safetensors", f"{FOLDER}/cal.safetensors"])
def test_a_calibration_that_would_be_removed_is_refused(
    name: str, source: Path, single: Path, calibration: Path, tmp_path: Path
) -> None:
    out = compress(single, tmp_path / "out", SETTINGS, keep_run=True).directory
    shutil.copyfile(calibration, out / name)
    before = held(out)
    settings = Settings(**{**SETTINGS.as_dict(), "calibrate": str(out / name)})
    with pytest.raises(UsageError, match=f"{name}.*are removed; move it"):
        compress(source, out, settings, overwrite=True)
    assert held(out) == before


def test_a_calibration_that_cannot_be_used_removes_nothing(
    source: Path, finished: Path, calibration: Path, single: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = held(out)
    for model, file, words in ((source, tmp_path / "none", "cannot be read"), (single, calibration, "another check")):
        with pytest.raises(GlobeError, match=words):
            compress(model, out, Settings(**{**SETTINGS.as_dict(), "calibrate": str(file)}), overwrite=True)
        assert held(out) == before


@pytest.mark.parametrize("place", ["globe.runs.store:RunStore.save", "globe.artifact.write:_write_bank"])
def test_a_killed_run_of_another_source_is_cleaned(place: str, source: Path, single: Path, tmp_path: Path) -> None:
    """Also of shards that were written and not recorded, and of half-written files."""
    out = tmp_path / "out"
    when = {"call": 5, "entered": True} if "save" in place else {}
    with Killer() as killer:
        killed = killer.run(source, out, {**SETTINGS.as_dict(), "families": ["gate"]}, place=place, **when)
    assert killed == -9 and (out / FOLDER).is_dir()
    (out / ".globe-00003-of-00003.safetensors.partial").write_bytes(b"half")
    (out / "globe-00002-of-00003.safetensors").write_bytes(b"not recorded yet")
    others = add_others(tmp_path / "others")
    shutil.copytree(tmp_path / "others", out, dirs_exist_ok=True)
    compress(single, out, SETTINGS, overwrite=True)
    assert set(held(out)) - set(others) == set(held(compress(single, tmp_path / "alone", SETTINGS).directory))
    assert others.items() <= held(out).items()


def test_records_that_lead_outside_are_not_followed(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    names = ["../mine.txt", "/etc/passwd", "a/../../mine.txt", "", ".", 3, None, f"{FOLDER}/key.json"]
    edit_json(out / "globe.json", lambda value: value.update(companions=[*names[:5], names[7]]))
    edit_json(out / "globe.safetensors.index.json", lambda value: value["weight_map"].update({"x": "../mine.txt"}))
    assert not recorded(out) & set(map(str, names)) and "globe-bank.safetensors" in recorded(out)
    (out / FOLDER).mkdir()
    for damaged in ("[]", '{"names": 3}', "{", '{"names": [3, {}, "../mine.txt"]}', json.dumps({"names": names})):
        (out / FOLDER / "written.txt").write_text(damaged, encoding="utf-8")
        assert "globe-bank.safetensors" in recorded(out) and not recorded(out) & set(map(str, names))


@pytest.mark.parametrize("moved", [False, True])
def test_an_export_does_not_replace_what_was_compressed(
    moved: bool, source: Path, finished: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(source, tmp_path / "moved")) if moved else source
    before = digests(place)
    with pytest.raises(UsageError, match=r"is the checkpoint that was compressed; name another"):
        export(finished, place, overwrite=True)
    assert digests(place) == before
