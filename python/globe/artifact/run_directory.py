"""The directory of a run: it goes on from what an earlier one did, and is whole only when config.json is there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from globe.artifact.lock import is_full, locked, unwritable
from globe.artifact.owned import (
    EXPORT_RECORD,
    Claim,
    clear,
    empty_run,
    present,
    record_run,
    recorded,
    refuse_directories,
)
from globe.artifact.refusals import (
    refuse_other_files,
    refuse_other_key,
    refuse_reads,
    require_space,
    tell_staying,
    used,
)
from globe.compute import ranks
from globe.errors import GlobeError
from globe.runs.shared_store import SharedStore
from globe.runs.store import FOLDER, Log, RunStore, Store, stored_key


@dataclass(frozen=True)
class Existing:
    """What becomes of what an output directory holds: see `globe.compress`."""

    fresh: bool = False
    overwrite: bool = False
    keep_run: bool = False


@dataclass(frozen=True)
class Identity:
    """What the weight files of a run depend on, and what else may show in their last bits: see `RunStore`."""

    key: Mapping[str, Any]
    environment: Mapping[str, Any]


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
        raise unwritable(path, error) from None


def _silent(line: str) -> None:
    """A rank that does not speak."""


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
    with locked(path, claim.source):
        going = {*recorded(path), *claim.names, EXPORT_RECORD}
        begun = stored_key(folder) if folder.is_dir() else None
        finished = finished_key(path)
        if existing.overwrite or (existing.fresh and (folder.is_dir() or finished is not None)):
            begun = None
            renewed = True
        else:
            renewed = False
            if finished is not None:
                refuse_other_key(path, "a finished output", finished, key, going)
                if not existing.keep_run:
                    shutil.rmtree(folder, ignore_errors=True)
                yield None
                return
            if begun is not None:
                refuse_other_key(path, "an unfinished run", _without_limit(begun), _without_limit(key), going)
            elif not folder.is_dir():
                refuse_other_files(path, going)
        refuse_reads(path, claim, going)
        require_space(path, claim, going)
        refuse_directories(path, going)
        if renewed:
            tell_staying(path, going, log)
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
            written = used(path, going)
            kept = [file.stem for file in folder.glob("*.json") if file.stem != "key"]
            with suppress(OSError):
                if not kept or (isinstance(error, GlobeError) and all(name.endswith(".scan") for name in kept)):
                    clear(path, claim.names)
                    shutil.rmtree(folder, ignore_errors=True)
                    kept = []
            if kept:
                log(f"{path}: unfinished; {FOLDER} keeps what is done, and the same command goes on from there")
            if is_full(error):
                raise unwritable(path, error, max(claim.all_bytes - written, 1 << 20) if kept else None) from None
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
