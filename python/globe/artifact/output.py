"""An output directory that is written in one go, and one of which files are replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from globe.artifact.lock import is_full, locked, unwritable
from globe.artifact.owned import EXPORT_RECORD, Claim, clear, record_export, recorded, refuse_directories
from globe.artifact.refusals import refuse_other_files, refuse_rivals, require_space, tell_staying
from globe.errors import GlobeError
from globe.runs.store import FOLDER, Log


@contextmanager
def output_directory(path: Path, claim: Claim, *, overwrite: bool, log: Log) -> Iterator[Path]:
    """Make and lock `path` for an export; on an error, take away what was written.

    Raises
    ------
    UsageError
        If `path` is the source, a file, or not empty and `overwrite` is not set; or a file of others would stay that
        is loaded instead of what is written.
    GlobeError
        If another run writes to it, or it cannot be written, or has less space free than is needed.
    """
    with locked(path, claim.source):
        going = recorded(path, dense=True) | set(claim.names)
        if not overwrite:
            refuse_other_files(path, going)
        refuse_rivals(path, claim, going)
        require_space(path, claim, going)
        refuse_directories(path, going)
        tell_staying(path, going, log)
        try:
            record_export(path, going)
        except OSError as error:
            clear(path, {EXPORT_RECORD})
            raise unwritable(path, error) from None
        clear(path, going)
        shutil.rmtree(path / FOLDER, ignore_errors=True)
        try:
            yield path
        except BaseException as error:
            with suppress(OSError):
                clear(path, {*claim.names, EXPORT_RECORD})
            if is_full(error):
                raise unwritable(path, error) from None
            raise
        clear(path, {EXPORT_RECORD})


@contextmanager
def changed_directory(path: Path, source: Path) -> Iterator[None]:
    """Lock a factored directory of which files are to be replaced.

    Raises
    ------
    UsageError
        If `path` is the source or a file.
    GlobeError
        If there is no such directory, another run writes to it, or it cannot be written.
    """
    if not path.exists():
        raise GlobeError(f"{path}: no such directory; expected one written by globe compress")
    with locked(path, source):
        yield
