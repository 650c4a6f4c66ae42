"""An output directory that is either whole (it has config.json) or visibly not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeGuard

from globe.autoload import LOADER_FILE
from globe.card import SETTINGS_FILE
from globe.errors import GlobeError, UsageError
from globe.runstore import FOLDER, Log, RunStore, differences, stored_key

_LOCK = ".globe-lock"
REPORT = "report.html"
_SMALL = ("config.json", "globe.json", "metrics.json", "README.md", LOADER_FILE, SETTINGS_FILE, REPORT)
_WRITTEN = (*_SMALL, "*.safetensors", "*.safetensors.index.json")


@contextmanager
def output_directory(path: Path, source: Path, *, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Make and lock `path`; on an error, take away what was written.

    Raises
    ------
    UsageError
        If `path` is the source, a file, or not empty and `overwrite` is not set.
    GlobeError
        If another run writes to it, or it cannot be written, or has less than `needed_bytes` free.
    """
    with _locked(path, source):
        if not overwrite:
            _refuse_other_files(path)
        _require_space(path, needed_bytes)
        _clear(path)
        try:
            yield path
        except BaseException as error:
            with suppress(OSError):
                _clear(path)
            if _is_full(error):
                raise _unwritable(path, error) from None
            raise


@contextmanager
def run_directory(
    path: Path,
    source: Path,
    key: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    fresh: bool,
    overwrite: bool,
    keep_run: bool,
    needed_bytes: int,
    log: Log,
) -> Iterator[RunStore | None]:
    """Make and lock `path` for a run that an earlier one may have begun.

    On an error, what is done stays for a later run of the same key; with nothing done but scans of a source that
    is refused, what was written is taken away. At the end the run's folder is removed, unless `keep_run`.

    Yields
    ------
    RunStore or None
        The results so far; None if `path` is the finished output of this key.

    Raises
    ------
    UsageError
        If `path` is the source or a file; or holds a run or an output of another key and neither `fresh` nor
        `overwrite` is set; or holds other files and `overwrite` is not set.
    GlobeError
        If another run writes to it, or it cannot be written, or has less than `needed_bytes` free.
    """
    folder = path / FOLDER
    with _locked(path, source):
        begun = stored_key(folder) if folder.is_dir() else None
        finished = finished_key(path)
        if overwrite or (fresh and (folder.is_dir() or finished is not None)):
            begun = None
            renewed = True
        else:
            renewed = False
            if finished is not None:
                _refuse_other_key(path, "a finished output", finished, key)
                if not keep_run:
                    shutil.rmtree(folder, ignore_errors=True)
                yield None
                return
            if begun is not None:
                _refuse_other_key(path, "an unfinished run", begun, key)
            elif not folder.is_dir():
                _refuse_other_files(path)
        _require_space(path, needed_bytes)
        if renewed:
            _refuse_directories(path)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()  # first: a process that ends while it clears leaves a directory that says what it is
            _clear(path)
        for left in path.glob(".*.partial"):
            left.unlink()
        try:
            store = RunStore(folder, key, environment, log)
            if begun is not None:
                log(f"{path}: going on with an unfinished run, which has {', '.join(store.names()) or 'no result yet'}")
            yield store
        except BaseException as error:
            written = _used(path)
            kept = [file.stem for file in folder.glob("*.json") if file.stem != "key"]
            with suppress(OSError):
                if not kept or (isinstance(error, GlobeError) and all(name.endswith(".scan") for name in kept)):
                    _clear(path)
                    shutil.rmtree(folder, ignore_errors=True)
                    kept = []
            if kept:
                log(f"{path}: unfinished; {FOLDER} keeps what is done, and the same command goes on from there")
            if _is_full(error):
                raise _unwritable(path, error, max(needed_bytes - written, 1 << 20) if kept else None) from None
            raise
        if not keep_run:
            shutil.rmtree(folder, ignore_errors=True)


def finished_key(path: Path) -> dict[str, Any] | None:
    """The key of the run whose finished output a directory is; None if it is none."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        metrics = json.loads((path / "metrics.json").read_bytes())
        if config["quantization_config"]["quant_method"] == "globe":
            return run_key(metrics["globe_version"], metrics["source"]["fingerprint"], metrics["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def run_key(version: str, fingerprint: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the weight files of a run depend on, as plain values."""
    return {"globe_version": version, "source": {"fingerprint": fingerprint}, "settings": dict(settings)}


@contextmanager
def _locked(path: Path, source: Path) -> Iterator[None]:
    """Make a directory, hold its lock, and remove it at the end if it was made here and is empty."""
    if path.resolve() == source.resolve():
        raise UsageError(f"output {path} is the source directory; name another")
    if path.exists() and not path.is_dir():
        raise UsageError(f"output {path} is a file; expected a directory")
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("w")
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        except OSError as error:
            raise _unwritable(path, error) from None
        if not _same_file(lock, path / _LOCK):  # its owner ended and removed it while it was opened here
            raise _taken(path)
        try:
            yield
            (path / _LOCK).unlink(missing_ok=True)
        except BaseException:
            with suppress(OSError):
                (path / _LOCK).unlink(missing_ok=True)
                if created and not any(path.iterdir()):
                    path.rmdir()
            raise
    finally:
        lock.close()


def _refuse_other_files(path: Path) -> None:
    present = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
    if present:
        what = "a finished checkpoint" if "config.json" in present else "an unfinished run or other files"
        raise UsageError(f"output {path} is not empty ({what}: {present[0]}, …); use --overwrite to replace it")


def _refuse_other_key(path: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = differences(found, wanted)
    if different:
        shown = ", ".join(different[:6]) + (f", and {len(different) - 6} more" if len(different) > 6 else "")
        raise UsageError(
            f"output {path} holds {what} of another source or other settings: {shown}; use --fresh to start over, "
            "or name another directory"
        )


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free + _used(path)
    if free < needed:
        raise GlobeError(f"output {path}: {free:,} bytes free, about {needed:,} needed; free some or name another disk")


def _used(path: Path) -> int:
    """Bytes of what GloBE wrote."""
    return sum(file.stat().st_size for file in [*_written(path), *(path / FOLDER).rglob("*")] if file.is_file())


def _is_full(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and other small files: all but weights, config.json and what GloBE writes itself."""
    left_alone = {*_SMALL, "globe.safetensors.index.json"}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
    for entry in sorted(source.iterdir()):
        hidden = entry.name.startswith(".") or entry.name.endswith(".index.json")
        if entry.is_file() and not hidden and entry.suffix not in weights and entry.name not in left_alone:
            temporary = target / f".{entry.name}.partial"
            shutil.copyfile(entry, temporary)
            temporary.replace(target / entry.name)


def _written(path: Path) -> list[Path]:
    return [file for pattern in (*_WRITTEN, ".*.partial") for file in path.glob(pattern)]


def _refuse_directories(path: Path) -> None:
    for file in _written(path):
        if file.is_dir():
            raise GlobeError(f"output {path}: {file.name} is a directory; expected a file: remove it or name another")


def _clear(path: Path) -> None:
    _refuse_directories(path)
    for file in _written(path):
        file.unlink()


def _same_file(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path) -> GlobeError:
    return GlobeError(f"output {path}: another run is writing there; wait for it or name another")


def _unwritable(path: Path, error: OSError, missing: int | None = None) -> GlobeError:
    remedy = "free space or name another directory"
    if missing is not None:
        remedy = f"free about {missing:,} bytes and run the same command again, which goes on from what is done"
    return GlobeError(f"output {path}: cannot be written ({error.strerror}); {remedy}")
