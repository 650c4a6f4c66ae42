"""An output directory that is either whole (it has config.json) or visibly not."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from globe.errors import GlobeError, UsageError

_LOCK = ".globe-lock"
_WRITTEN = ("config.json", "globe.json", "metrics.json", "README.md", "*.safetensors", "*.safetensors.index.json")


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
        owned = False
        try:
            present = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
            if present and not overwrite:
                what = "a finished checkpoint" if "config.json" in present else "an unfinished run or other files"
                raise UsageError(f"output {path} is not empty ({what}: {present[0]}, …); use --overwrite to replace it")
            free = shutil.disk_usage(path).free + sum(file.stat().st_size for file in _written(path))
            if free < needed_bytes:
                raise GlobeError(
                    f"output {path}: {free:,} bytes free, about {needed_bytes:,} needed; free some or name another disk"
                )
            _clear(path)
            owned = True
            yield path
            (path / _LOCK).unlink(missing_ok=True)
        except BaseException as error:
            with suppress(OSError):
                if owned:
                    _clear(path)
                (path / _LOCK).unlink(missing_ok=True)
                if created and not any(path.iterdir()):
                    path.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
                raise _unwritable(path, error) from None
            raise
    finally:
        lock.close()


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and other small files: all but weights, config.json and what GloBE writes itself."""
    left_alone = {"config.json", "README.md", "metrics.json", "globe.json", "globe.safetensors.index.json"}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
    for entry in sorted(source.iterdir()):
        hidden = entry.name.startswith(".") or entry.name.endswith(".index.json")
        if entry.is_file() and not hidden and entry.suffix not in weights and entry.name not in left_alone:
            temporary = target / f".{entry.name}.partial"
            shutil.copyfile(entry, temporary)
            temporary.replace(target / entry.name)


def _written(path: Path) -> list[Path]:
    return [file for pattern in (*_WRITTEN, ".*.partial") for file in path.glob(pattern)]


def _clear(path: Path) -> None:
    for file in _written(path):
        if file.is_dir():
            raise GlobeError(f"output {path}: {file.name} is a directory; expected a file: remove it or name another")
        file.unlink()


def _same_file(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path) -> GlobeError:
    return GlobeError(f"output {path}: another run is writing there; wait for it or name another")


def _unwritable(path: Path, error: OSError) -> GlobeError:
    return GlobeError(f"output {path}: cannot be written ({error.strerror}); free space or name another directory")
