"""Output directories that cannot be written, are taken, or were left by a command that ended too early."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.artifact import lock as locking  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.settings import Settings  # noqa: E402
from refusals import SMALL, command, in_process, refusal  # noqa: E402
from trips import digests  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", **WEIGHTS_ONLY)
ENDLESS = "outer_loops: 100000\npatience: 100000\ntolerance: 0\nsolver: alternate\ncalibrate: none\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("finished") / "out", SETTINGS).directory


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options; unmounted at the end."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"mount{len(mounted)}"
        place.mkdir()
        if sys.platform != "linux" or shutil.which("mount") is None:
            pytest.skip("a small file system needs Linux's tmpfs and the mount command")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small tmpfs needs root ({done.stderr.strip()})")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_read_only_parent(source: Path, mount: Callable[[str], Path]) -> None:
    place = mount("ro,size=64k")
    line = refusal(1, "compress", source, place / "out", *SMALL)
    assert f"output {place / 'out'}" in line and "Read-only file system" in line
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where permissions forbid it")
def test_parent_without_write_permission(source: Path, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir(mode=0o555)
    line = refusal(1, "compress", source, tmp_path / "parent" / "out", *SMALL)
    assert "Permission denied" in line and list((tmp_path / "parent").iterdir()) == []


@pytest.mark.parametrize("what", ["compress", "export"])
@pytest.mark.parametrize("early", [True, False], ids=["too small from the start", "fills up on the way"])
def test_full_disk(early: bool, what: str, source: Path, finished: Path, mount: Callable[[str], Path]) -> None:
    arguments = ("compress", source, *SMALL) if what == "compress" else ("export", finished)
    line = refusal(1, *arguments, mount("size=64k") / "out")
    found = re.search(r"output \S+/out: ([\d,]+) bytes free, about ([\d,]+) needed", line)
    assert found is not None, line
    assert int(found[1].replace(",", "")) <= 64 << 10 < int(found[2].replace(",", ""))
    if not early:  # what is needed for weights is there, what headers and tokenizer take is not
        place = mount(f"size={-(-int(found[2].replace(',', '')) // 4096) * 4096}")
        line = refusal(1, *arguments, place / "out", process=what == "compress")
        assert f"output {place / 'out'}: cannot be written (No space left on device)" in line
        if what == "export":
            assert list(place.iterdir()) == []
            return
        assert "run the same command again" in line
        left = {file.name for file in (place / "out").iterdir()}
        assert ".globe-run" in left and not left & {"config.json", ".globe-lock"}
        assert not [file for file in place.rglob("*") if file.name.endswith(".partial")]
        subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
        assert in_process(*arguments, place / "out", "-q").returncode == 0
        assert digests(place / "out") == digests(finished)


def test_needed_bytes_count_a_source_in_fp32(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    """What stays in fp32 takes four bytes a weight, and this is known before the work begins."""
    source = make_tiny("olmoe", tmp_path / "source", dtype="float32")
    out = compress(source, tmp_path / "out", SETTINGS).directory
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    line = refusal(1, "compress", source, mount("size=64k") / "out", *SMALL)
    found = re.search(r"about ([\d,]+) needed", line)
    assert found is not None and 0.95 * stored <= int(found[1].replace(",", "")) <= 1.05 * stored


def test_too_little_space_leaves_the_old_output(finished: Path, source: Path, mount: Callable[[str], Path]) -> None:
    place = mount("size=64k") / "out"
    place.mkdir()
    for name in ("config.json", "globe.json"):
        (place / name).write_text("old", encoding="utf-8")
    assert "needed" in refusal(1, "compress", source, place, *SMALL, "--overwrite")
    assert {file.name: file.read_text() for file in place.iterdir()} == {"config.json": "old", "globe.json": "old"}


@pytest.mark.parametrize("what", ["compress", "export"])
def test_output_that_is_not_empty(what: str, source: Path, finished: Path, tmp_path: Path) -> None:
    arguments = ("compress", source, *SMALL) if what == "compress" else ("export", finished)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    line = refusal(2, *arguments, out)
    assert str(out) in line and "notes.txt" in line and "--overwrite" in line
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    (out / "config.json").write_text("{}", encoding="utf-8")
    assert "a finished checkpoint" in refusal(2, *arguments, out)
    assert (out / "config.json").read_text() == "{}"
    done = in_process(*arguments, out, "--overwrite", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "notes.txt").read_text() == "mine" and (out / "config.json").read_text() != "{}"


def test_output_in_an_impossible_place(source: Path, finished: Path, tmp_path: Path) -> None:
    before = digests(source)
    assert "is the source directory" in refusal(2, "compress", source, source, *SMALL, "--overwrite")
    (tmp_path / "link").symlink_to(source)
    assert "is the source directory" in refusal(2, "compress", source, tmp_path / "link", *SMALL, "--overwrite")
    assert "is the source directory" in refusal(2, "export", finished, finished, "--overwrite")
    assert digests(source) == before and (finished / "config.json").exists()
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert f"{file} is a file" in refusal(2, "compress", source, file, *SMALL, "--overwrite")
    assert "cannot be written" in refusal(1, "compress", source, file / "out", *SMALL)
    assert file.read_text() == "mine"
    assert "File name too long" in refusal(1, "compress", source, tmp_path / ("o" * 300), *SMALL)
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    line = refusal(1, "compress", source, tmp_path / "out", *SMALL, "--overwrite")
    assert "config.json is a directory" in line and (tmp_path / "out" / "config.json").is_dir()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


def endless(source: Path, out: Path, directory: Path) -> subprocess.Popen[str]:
    """Start a run that does not end by itself, and wait until it is at work in `out`."""
    (directory / "endless.yaml").write_text(ENDLESS, encoding="utf-8")
    options = ("--rank", "0.5", "--bank-size", "3", "--threads", "1", "--config", directory / "endless.yaml")
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    arguments = command("compress", source, out, *options)
    run = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    assert run.stderr is not None
    assert any("up: scan" in line for line in run.stderr), "it ended before it began"
    return run


def test_two_runs_into_one_output_then_kill(source: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = endless(source, out, tmp_path)
    try:
        for arguments in (("compress", source, out, *SMALL), ("compress", source, out, *SMALL, "--overwrite")):
            line = refusal(1, *arguments)
            assert f"output {out}: another run is writing there" in line
        assert "another run" in refusal(1, "export", finished, out, "--overwrite")
        assert first.poll() is None and (out / ".globe-lock").exists()
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    in_process("compress", source, out, *SMALL, "-q", "--overwrite")
    assert digests(out) == digests(finished)
    assert not (out / ".globe-lock").exists()


def test_interrupt_keeps_what_is_done(source: Path, tmp_path: Path) -> None:
    run = endless(source, tmp_path / "out", tmp_path)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and stderr.endswith("\nglobe: stopped\n") and "Traceback" not in stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".globe-run"}
    assert "an unfinished run of another source or other settings" in refusal(2, "compress", source, tmp_path / "out")


KILL = """
import os, signal, sys
import globe.pipeline.compress, globe.artifact.export, globe.artifact.write
from globe.cli import main
def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(sys.modules[sys.argv.pop(1)], sys.argv.pop(1), kill)
main()
"""


@pytest.mark.parametrize(
    ("what", "module", "function", "left"),
    [
        ("compress", "globe.artifact.write", "_write_bank", "globe-00002-of-00002.safetensors"),
        ("compress", "globe.pipeline.closing", "model_card", "globe.json"),
        ("export", "globe.artifact.export", "copy_companions", "model-00002-of-00002.safetensors"),
    ],
)
def test_killed_while_it_overwrites(
    what: str, module: str, function: str, left: str, source: Path, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    arguments = ("compress", source, out, *SMALL) if what == "compress" else ("export", finished, out)
    script = [sys.executable, "-c", KILL, module, function, *map(str, arguments), "--overwrite", "-q"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")
    assert (out / left).exists() and not (out / "config.json").exists()
    for reader in ("inspect", "eval"):
        assert "config.json" in refusal(1, reader, out)
    refusal(1, "export", out, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    if what == "compress":  # goes on by itself
        done = in_process(*arguments, "-q")
    else:
        assert "an unfinished run" in refusal(2, *arguments)
        done = in_process(*arguments, "--overwrite", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    if what == "compress":
        assert digests(out) == digests(finished)
    else:
        assert not any(file.name.startswith("globe") for file in out.iterdir())
        assert (out / "config.json").exists()
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_a_lock_whose_owner_has_just_removed_it_is_no_lock(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs must not both hold a lock: one on the removed file, one on the file that took its name."""
    lock, flock = tmp_path / "out" / ".globe-lock", locking.fcntl.flock

    def owner_ends_first(*arguments: object) -> None:
        flock(*arguments)
        lock.unlink()

    monkeypatch.setattr(locking.fcntl, "flock", owner_ends_first)
    with pytest.raises(GlobeError, match="another run"):
        compress(source, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()
