"""The files of an output directory that are GloBE's: those that its own records name, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from globe.artifact.factored import BANK_FILE, INDEX_FILE, MANIFEST, shard_name
from globe.checkpoint.companions import OWN
from globe.checkpoint.shards import INDEX_NAME
from globe.checkpoint.tensorfile import write_text
from globe.errors import GlobeError
from globe.runs.store import FOLDER

LOCK = ".globe-lock"
EXPORT_RECORD = ".globe-export.json"  # while an export is written
_RUN_RECORD = "written.txt"  # in the run's folder, beside its results


@dataclass(frozen=True)
class Scratch:
    """Files that a run has beside its output for a while: their bytes, and the options that would do without them."""

    size: int
    remedies: str


@dataclass(frozen=True)
class Claim:
    """What a run does to an output directory: its source, the files it writes, the bytes it needs, the files it reads.

    `names` are relative to the directory; `scratch` files, if it has any, come on top of the bytes.
    """

    source: Path
    names: tuple[str, ...]
    needed_bytes: int
    reads: tuple[Path, ...] = ()
    scratch: Scratch | None = None

    @property
    def all_bytes(self) -> int:
        """The bytes it needs, scratch files and all."""
        return self.needed_bytes + (self.scratch.size if self.scratch is not None else 0)


def factored_names(shards: Iterable[str], companions: Iterable[str]) -> tuple[str, ...]:
    """What a compression writes, from the names of the source's shards and of what goes along."""
    return (*OWN, INDEX_FILE, BANK_FILE, *map(shard_name, shards), *companions)


def recorded(path: Path, *, dense: bool = False) -> set[str]:
    """The files that GloBE's records in a directory name, of finished and of half-written outputs.

    Parameters
    ----------
    path : Path
    dense : bool
        Whether the index of a dense checkpoint counts as a record: it does where another export takes its place.
    """
    found: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = _read(path / MANIFEST)
        found.update(factored_names([shard["file"] for shard in manifest["source"]["shards"]], ()))
        found.update(manifest.get("companions", ()))
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        metrics = _read(path / "metrics.json")
        found.update(metrics["files"] if "globe_version" in metrics else ())
    for index in (INDEX_FILE, *((INDEX_NAME,) if dense else ())):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found.update(_read(path / index)["weight_map"].values())
            found.add(index)
    for record in (path / EXPORT_RECORD, path / FOLDER / _RUN_RECORD):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found.update(_read(record)["names"])
    for result in path.glob(f"{FOLDER}/shard-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found.add(_read(result)["meta"]["file"])
    return {name for name in found if _is_inside(name)}


def record_run(path: Path, names: Iterable[str]) -> None:
    """Say in the run's folder which files are being written."""
    _record(path / FOLDER / _RUN_RECORD, names)


def record_export(path: Path, names: Iterable[str]) -> None:
    """Say in a directory which files an export is writing there."""
    _record(path / EXPORT_RECORD, names)


def empty_run(path: Path, names: Iterable[str]) -> None:
    """Leave nothing in the run's folder but the names of the files that are about to go, the key first."""
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    record_run(path, names)
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name != "key.json"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _RUN_RECORD:
            entry.unlink(missing_ok=True)


def present(path: Path, names: Iterable[str]) -> list[Path]:
    """Those of the files that are there, whole or under their temporary names, config.json first."""
    found = []
    for name in sorted(names, key=lambda name: (name != "config.json", name)):
        place = path / name
        found += [file for file in (place, place.with_name(f".{place.name}.partial")) if _is_there(file)]
    return found


def clear(path: Path, names: Iterable[str]) -> None:
    """Remove files of these names, and folders that this leaves empty.

    Raises
    ------
    GlobeError
        If one is a directory; then none is removed.
    """
    names = set(names)
    refuse_directories(path, names)
    for file in present(path, names):
        file.unlink()
    for folder in sorted({path / parent for name in names for parent in PurePosixPath(name).parents}, reverse=True):
        if folder != path and folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def refuse_directories(path: Path, names: Iterable[str]) -> None:
    """Refuse a directory where a file is to be."""
    for file in present(path, names):
        if file.is_dir():
            name = file.relative_to(path)
            raise GlobeError(f"output {path}: {name} is a directory; expected a file: remove it or name another")


def staying(path: Path, names: Iterable[str]) -> list[str]:
    """What of a directory is none of these files: other files, also those beside them in a folder, other folders."""
    going = {file.relative_to(path).as_posix() for file in present(path, names)}
    going |= {LOCK, EXPORT_RECORD, f".{EXPORT_RECORD}.partial"}
    shared = {name.partition("/")[0] for name in going if "/" in name}
    found: list[str] = []
    for entry in sorted(path.iterdir()):
        if not entry.is_dir() or entry.is_symlink():
            found += [entry.name]
        elif entry.name in shared:
            found += sorted(file.relative_to(path).as_posix() for file in entry.rglob("*") if not file.is_dir())
        elif entry.name != FOLDER:
            found += [f"{entry.name}/"]
    return [name for name in found if name not in going]


def outlook(path: Path, names: Iterable[str]) -> str:
    """What would stay and what would go if these files were replaced, in words."""
    names = set(names)
    going = sorted(file.relative_to(path).as_posix() for file in present(path, names))
    going += [f"{FOLDER}/"] if (path / FOLDER).is_dir() else []
    return f"would stay: {some(staying(path, names))}; would go: {some(going)}"


def some(names: list[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _record(path: Path, names: Iterable[str]) -> None:
    write_text(path, json.dumps({"names": sorted(names)}, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_bytes())
    return value


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_inside(name: object) -> bool:
    """Whether a record names a file inside the directory."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    parts = PurePosixPath(name).parts
    return name == "/".join(parts) and ".." not in parts and parts[0] not in ("/", FOLDER, LOCK)
