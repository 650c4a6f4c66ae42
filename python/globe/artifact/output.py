"""An output directory that is either whole (it has config.json) or visibly not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from globe.artifact.factored import MANIFEST
from globe.artifact.owned import (
    EXPORT_RECORD,
    LOCK,
    Claim,
    clear,
    empty_run,
    outlook,
    present,
    record_export,
    record_run,
    recorded,
    refuse_directories,
    some,
    staying,
)
from globe.checkpoint.index import INDEX_NAME, SINGLE
from globe.compute import ranks
from globe.errors import GlobeError, UsageError
from globe.runs.shared_store import SharedStore
from globe.runs.store import FOLDER, Log, RunStore, Store, differences, stored_key


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
    with _locked(path, claim.source):
        going = recorded(path, dense=True) | set(claim.names)
        if not overwrite:
            _refuse_other_files(path, going)
        _refuse_rivals(path, claim, going)
        _require_space(path, claim, going)
        refuse_directories(path, going)
        _tell_staying(path, going, log)
        try:
            record_export(path, going)
        except OSError as error:
            clear(path, {EXPORT_RECORD})
            raise _unwritable(path, error) from None
        clear(path, going)
        shutil.rmtree(path / FOLDER, ignore_errors=True)
        try:
            yield path
        except BaseException as error:
            with suppress(OSError):
                clear(path, {*claim.names, EXPORT_RECORD})
            if _is_full(error):
                raise _unwritable(path, error) from None
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
    with _locked(path, source):
        yield


@dataclass(frozen=True)
class Existing:
    """What becomes of what an output directory holds: see `globe.compress`."""

    fresh: bool = False
    overwrite: bool = False
    keep_run: bool = False


@contextmanager
def shared_directory(
    path: Path, claim: Claim, identity: Identity, existing: Existing, log: Log
) -> Iterator[Store | None]:
    """`run_directory` for all ranks: rank 0 makes and locks it, and every rank has to be able to write there.

    Raises
    ------
    UsageError, GlobeError
        As `run_directory`, at every rank; or if one of them cannot write there, or sees another directory.
    """
    if ranks.size() == 1:
        with run_directory(path, claim, identity, existing, log) as store:
            yield store
        return
    with ExitStack() as stack:
        begins = ranks.lead(
            lambda: stack.enter_context(run_directory(path, claim, identity, existing, log)) is not None
        )
        if not begins:
            yield None
            return
        with ranks.together():
            _require_shared(path)
            store = RunStore(path / FOLDER, identity.key, identity.environment, log if ranks.rank() == 0 else _silent)
        yield SharedStore(store)
        ranks.gathered(None)  # nobody is at work there any more when rank 0 takes the run's folder away


def _require_shared(path: Path) -> None:
    """Refuse a directory that this rank cannot write, or that is not the one that rank 0 has made."""
    if not ranks.seen(path / FOLDER):
        raise GlobeError(
            f"output {path}: not the directory that rank 0 has made; expected one that all machines share: name such"
        )
    try:
        with tempfile.TemporaryFile(dir=path), tempfile.TemporaryFile(dir=path / FOLDER):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def _silent(line: str) -> None:
    """A rank that does not speak."""


@dataclass(frozen=True)
class Identity:
    """What the weight files of a run depend on, and what else may show in their last bits: see `RunStore`."""

    key: Mapping[str, Any]
    environment: Mapping[str, Any]


@contextmanager
def run_directory(
    path: Path, claim: Claim, identity: Identity, existing: Existing, log: Log
) -> Iterator[RunStore | None]:
    """Make and lock `path` for a run that an earlier one may have begun.

    On an error, what is done stays for a later run of the same key; with nothing done but scans of a source that
    is refused, what was written is taken away. At the end the run's folder is removed, unless it is to be kept.

    Yields
    ------
    RunStore or None
        The results so far; None if `path` is the finished output of this key.

    Raises
    ------
    UsageError
        If `path` is the source or a file; or holds a run or an output of another key, or other files, that are not
        to be replaced; or a file that the run reads is one of those that go.
    GlobeError
        If another run writes to it, or it cannot be written, or has less space free than is needed.
    """
    folder, key = path / FOLDER, identity.key
    with _locked(path, claim.source):
        going = {*recorded(path), *claim.names, EXPORT_RECORD}
        begun = stored_key(folder) if folder.is_dir() else None
        finished = finished_key(path)
        if existing.overwrite or (existing.fresh and (folder.is_dir() or finished is not None)):
            begun = None
            renewed = True
        else:
            renewed = False
            if finished is not None:
                _refuse_other_key(path, "a finished output", finished, key, going)
                if not existing.keep_run:
                    shutil.rmtree(folder, ignore_errors=True)
                yield None
                return
            if begun is not None:
                _refuse_other_key(path, "an unfinished run", _without_limit(begun), _without_limit(key), going)
            elif not folder.is_dir():
                _refuse_other_files(path, going)
        _refuse_reads(path, claim, going)
        _require_space(path, claim, going)
        refuse_directories(path, going)
        if renewed:
            _tell_staying(path, going, log)
            empty_run(path, going)  # first: a process that ends while it clears leaves a directory that says what it is
        if begun is None:
            clear(path, going)
        for left in present(path, going):
            if left.name.endswith(".partial"):
                left.unlink()
        try:
            store = RunStore(folder, key, identity.environment, log)
            record_run(path, claim.names)
            if begun is not None:
                log(f"{path}: going on with an unfinished run, which has {', '.join(store.names()) or 'no result yet'}")
            yield store
        except BaseException as error:
            written = _used(path, going)
            kept = [file.stem for file in folder.glob("*.json") if file.stem != "key"]
            with suppress(OSError):
                if not kept or (isinstance(error, GlobeError) and all(name.endswith(".scan") for name in kept)):
                    clear(path, claim.names)
                    shutil.rmtree(folder, ignore_errors=True)
                    kept = []
            if kept:
                log(f"{path}: unfinished; {FOLDER} keeps what is done, and the same command goes on from there")
            if _is_full(error):
                raise _unwritable(path, error, max(claim.all_bytes - written, 1 << 20) if kept else None) from None
            raise
        if not existing.keep_run:
            shutil.rmtree(folder, ignore_errors=True)


def finished_key(path: Path) -> dict[str, Any] | None:
    """The key of the run whose finished output a directory is; None if it is none."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        metrics = json.loads((path / "metrics.json").read_bytes())
        if config["quantization_config"]["quant_method"] == "globe":
            source, count = metrics["source"]["fingerprint"], metrics.get("ranks", 1)
            return run_key(metrics["globe_version"], source, metrics["settings"], count)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def run_key(version: str, fingerprint: str, settings: Mapping[str, Any], ranks: int = 1) -> dict[str, Any]:
    """What the weight files of a run depend on, as plain values; of one rank nothing is said of their number."""
    shared = {"ranks": ranks} if ranks > 1 else {}
    return {"globe_version": version, "source": {"fingerprint": fingerprint}, "settings": dict(settings), **shared}


def _without_limit(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key but for the time limit: an unfinished run may go on under another one."""
    settings = {name: value for name, value in key.get("settings", {}).items() if name != "time_limit"}
    return {**key, "settings": settings}


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
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        except OSError as error:
            raise _unwritable(path, error) from None
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


def _refuse_other_files(path: Path, going: set[str]) -> None:
    if any(entry.name != LOCK for entry in path.iterdir()):
        finished = (path / "config.json").exists()
        what = "a finished checkpoint" if finished else "an unfinished run or other files"
        raise UsageError(
            f"output {path} is not empty ({what}; {outlook(path, going)}); use --overwrite to replace what would go, "
            "or name another directory"
        )


def _refuse_other_key(
    path: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], going: set[str]
) -> None:
    different = differences(found, wanted)
    if different:
        shown = ", ".join(different[:6]) + (f", and {len(different) - 6} more" if len(different) > 6 else "")
        raise UsageError(
            f"output {path} holds {what} of another source or other settings: {shown}; use --fresh to start over "
            f"({outlook(path, going)}), or name another directory"
        )


def _refuse_rivals(path: Path, claim: Claim, going: set[str]) -> None:
    """Refuse a directory where a file that stays would be loaded instead of what is written, or before it."""
    weights = [name for name in claim.names if name.endswith(".safetensors")]
    rivals = {MANIFEST: "marks a factored checkpoint"}
    if weights != [SINGLE]:
        rivals[SINGLE] = f"is read by transformers instead of the files that {INDEX_NAME} names"
    for name in staying(path, going):
        if name in rivals:
            raise UsageError(
                f"output {path}: {name} is not GloBE's as far as its records tell, would stay, and {rivals[name]}; "
                "move it away or name another directory"
            )


def _refuse_reads(path: Path, claim: Claim, going: set[str]) -> None:
    """Refuse to read what this run is about to remove."""
    for file in claim.reads:
        place = file.resolve()
        doomed = {(path / name).resolve() for name in going}
        if place in doomed or (path / FOLDER).resolve() in place.parents:
            raise UsageError(
                f"calibrate is {str(file)!r}, which is among the files of output {path} that are removed; move it "
                "elsewhere first, or name another directory"
            )


def _tell_staying(path: Path, going: set[str], log: Log) -> None:
    stays = staying(path, going)
    if stays:
        log(f"{path}: left as they are: {some(stays)}")


def _require_space(path: Path, claim: Claim, going: set[str]) -> None:
    free, scratch = shutil.disk_usage(path).free + _used(path, going), claim.scratch
    if free >= claim.all_bytes:
        return
    remedies, told = "free some or name another disk", ""
    if scratch is not None:
        told = f", {scratch.size:,} of them for matrices of experts that the joint fit has no memory for"
        remedies += f", or use {scratch.remedies}" if free >= claim.needed_bytes else ""
    raise GlobeError(f"output {path}: {free:,} bytes free, about {claim.all_bytes:,} needed{told}; {remedies}")


def _used(path: Path, names: set[str]) -> int:
    """Bytes of what GloBE wrote."""
    files = [*present(path, names), *(path / FOLDER).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _is_full(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


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
