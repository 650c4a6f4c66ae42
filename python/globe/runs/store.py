"""What a run has done so far: named results, each whole and checksummed, or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.tensorfile import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    FileHeader,
    TensorWriter,
    file_sha256,
    read_header,
    write_text,
)
from globe.errors import GlobeError

FOLDER = ".globe-run"
_KEY = "key.json"
SCRATCH = "scratch"
_CHUNK = 1 << 24

Log = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """A result: tensors by name, on the CPU, and what JSON can say."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]

    def array(self, name: str) -> NDArray[np.float64]:
        """A tensor as an array."""
        array: NDArray[np.float64] = self.tensors[name].numpy()
        return array


class Store(Protocol):
    """Where the stages of a run leave their results."""

    def names(self) -> list[str]:
        """The results that exist; whether one is intact shows when it is loaded."""

    def load(self, name: str) -> Saved | None:
        """The result, bit for bit as it was saved; None if there is none that is intact."""

    def check(self, name: str) -> dict[str, Any] | None:
        """What `load` would give but for the tensors, none of which is held in memory."""

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Save a result; a second one of the same name replaces the first."""

    def drop(self, name: str) -> None:
        """Forget a result."""

    def scratch(self) -> AbstractContextManager[str]:
        """An empty directory, removed at the end, for files that no later process needs."""


@dataclass
class MemoryStore:
    """Results in memory, for a run that no later process continues."""

    results: dict[str, Saved] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The results."""
        return list(self.results)

    def load(self, name: str) -> Saved | None:
        """The result, as a copy."""
        saved = self.results.get(name)
        return saved and Saved({key: value.clone() for key, value in saved.tensors.items()}, saved.meta)

    def check(self, name: str) -> dict[str, Any] | None:
        """The result but for its tensors."""
        return self.results[name].meta if name in self.results else None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Keep a copy."""
        copies = {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
        self.results[name] = Saved(copies, _plain(meta))

    def drop(self, name: str) -> None:
        """Forget a result."""
        self.results.pop(name, None)

    def scratch(self) -> AbstractContextManager[str]:
        """A temporary directory."""
        return tempfile.TemporaryDirectory()


class RunStore:
    """Results as files of one directory: NAME.safetensors, and NAME.json with its SHA-256 and what JSON can say.

    Every file is written under a temporary name, synced and renamed, NAME.json last. A file that was damaged
    since is noticed by its checksum when it is loaded; its result then counts as absent, and `log` says so.

    Parameters
    ----------
    directory : Path
        Made here if it does not exist.
    key : mapping
        What the results depend on, as plain values. Results under another key are never mixed with these:
        compare `stored_key` first.
    environment : mapping
        What else may show in the last bits of results; a change of it is said by `log`.
    log : callable
        Shows a line.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], environment: Mapping[str, Any], log: Log) -> None:
        self.directory = directory
        self._log = log
        directory.mkdir(exist_ok=True)
        for left in directory.glob(".*.partial"):
            left.unlink()
        for left in directory.glob("*.safetensors"):
            if not left.with_suffix(".json").exists():  # an earlier process ended between the two
                left.unlink()
        for folder in directory.glob(f"{SCRATCH}*"):
            shutil.rmtree(folder, ignore_errors=True)
        began = _read_key(directory)
        for line in differences(began["environment"], environment) if began is not None else ():
            log(f"going on in another environment: {line}; the weights may differ in their last bits")
        if began is None:
            for name in self.names():
                log(f"{directory / name}.json: of a run that cannot be told any more; done again")
                self.drop(name)
            write_text(directory / _KEY, _dump({"key": key, "environment": environment}))

    def names(self) -> list[str]:
        """The results that exist, in order of their names."""
        return sorted(path.stem for path in self.directory.glob("*.json") if path.name != _KEY)

    def load(self, name: str) -> Saved | None:
        """The result, bit for bit; None if there is none, or it is damaged."""
        try:
            manifest = self._manifest(name)
            if manifest is None:
                return None
            tensors: dict[str, torch.Tensor] = {}
            if manifest["file_sha256"] is not None:
                tensors = _read_checked(self._file(name), manifest["file_sha256"])
            return Saved(tensors, manifest["meta"])
        except GlobeError as error:
            self._damaged(name, error)
            return None

    def check(self, name: str) -> dict[str, Any] | None:
        """What `load` would give but for the tensors; their file is read, and not held in memory."""
        try:
            manifest = self._manifest(name)
            if manifest is None:
                return None
            wanted = manifest["file_sha256"]
            if wanted is not None and wanted != file_sha256(self._file(name)):
                raise GlobeError(f"{self._file(name)}: its SHA-256 is not the one recorded")
            meta: dict[str, Any] = manifest["meta"]
            return meta
        except (GlobeError, OSError) as error:
            self._damaged(name, error)
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Save a result, a piece of a tensor at a time."""
        self.drop(name)
        sha256 = None
        if tensors:
            entries = {key: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
            with TensorWriter(self._file(name), entries) as writer:
                for key, value in tensors.items():
                    writer.write_chunks(key, _pieces(value))
            sha256 = writer.sha256
        content = {"file_sha256": sha256, "meta": _plain(meta)}
        write_text(self.directory / f"{name}.json", _dump({**content, "sha256": _digest(content)}))

    def drop(self, name: str) -> None:
        """Remove a result's files."""
        (self.directory / f"{name}.json").unlink(missing_ok=True)
        self._file(name).unlink(missing_ok=True)

    def scratch(self) -> AbstractContextManager[str]:
        """An empty directory, removed at the end or when the store is opened again."""
        return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.directory)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _manifest(self, name: str) -> dict[str, Any] | None:
        path = self.directory / f"{name}.json"
        try:
            content = json.loads(path.read_bytes())
            stated = content.pop("sha256")
            if stated == _digest(content):
                return {"file_sha256": content["file_sha256"], "meta": content["meta"]}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise GlobeError(f"{path}: not as it was written")

    def _damaged(self, name: str, error: Exception) -> None:
        self._log(f"{self.directory.name}: result {name} is damaged and will be made again ({error})")
        with suppress(OSError):
            self.drop(name)


def stored_key(directory: Path) -> dict[str, Any] | None:
    """The key under which a directory's results were saved; None if it says none."""
    found = _read_key(directory)
    return found and found["key"]


def _read_key(directory: Path) -> dict[str, dict[str, Any]] | None:
    try:
        found = json.loads((directory / _KEY).read_bytes())
        if isinstance(found["key"], dict) and isinstance(found["environment"], dict):
            return {"key": found["key"], "environment": found["environment"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two keys, one phrase each: the entry, its value there, its value now."""
    lines = []
    for name in sorted({*found, *wanted}):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} (found {_shown(old)}, expected {_shown(new)})")
    return lines


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: keys are strings, tuples are lists, as are arrays and tensors."""
    return json.loads(json.dumps(value, default=lambda other: other.tolist()))


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}…{text[-3:]}"


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    for part in tensor.detach().contiguous().flatten().split(_CHUNK // tensor.element_size()):
        yield part.cpu().view(torch.uint8).numpy().data


def _read_checked(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """All tensors of a file, read once; the bytes are checked as they come."""
    header: FileHeader = read_header(path)
    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    try:
        with path.open("rb", buffering=0) as file:
            digest.update(file.read(8 + len(header.raw)))
            for name, info in header.tensors.items():
                tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
                view = tensor.flatten().view(torch.uint8).numpy().data
                done = 0
                while done < info.nbytes:
                    got = file.readinto(view[done : done + _CHUNK])
                    if not got:
                        raise GlobeError(f"{path}: ended early")
                    digest.update(view[done : done + got])
                    done += got
                tensors[name] = tensor
    except OSError as error:
        raise GlobeError(f"{path}: cannot be read ({error.strerror})") from None
    if digest.hexdigest() != sha256:
        raise GlobeError(f"{path}: its SHA-256 is not the one recorded")
    return tensors
