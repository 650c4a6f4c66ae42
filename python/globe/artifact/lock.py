"""One process at a time writes to a directory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeGuard

from globe.artifact.owned import LOCK
from globe.errors import GlobeError, UsageError


@contextmanager
def locked(path: Path, source: Path) -> Iterator[None]:
    """Make a directory, hold its lock, and remove it at the end if it was made here and is empty."""
    if path.resolve() == source.resolve():
        raise UsageError(f"output {path} is the source directory; name another")
    if path.exists() and not path.is_dir():
        raise UsageError(f"output {path} is a file; expected a directory")
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        except OSError as error:
            raise unwritable(path, error) from None
        if not _same_file(lock, path / LOCK):  # its owner ended and removed it while it was opened here
            raise _taken(path)
        try:
            yield
            (path / LOCK).unlink(missing_ok=True)
        except BaseException:
            with suppress(OSError):
                (path / LOCK).unlink(missing_ok=True)
                if created and not any(path.iterdir()):
                    path.rmdir()
            raise
    finally:
        lock.close()


def _same_file(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path) -> GlobeError:
    return GlobeError(f"output {path}: another run is writing there; wait for it or name another")


def unwritable(path: Path, error: OSError, missing: int | None = None) -> GlobeError:
    """The refusal of a directory that cannot be written; `missing` bytes would let the run go on."""
    remedy = "free space or name another directory"
    if missing is not None:
        remedy = f"free about {missing:,} bytes and run the same command again, which goes on from what is done"
    return GlobeError(f"output {path}: cannot be written ({error.strerror}); {remedy}")


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether a disk is full, read-only or over its quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
