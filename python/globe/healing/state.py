"""What a healing that is stopped goes on from: OUT/.globe-heal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.tensorfile import write_text
from globe.errors import GlobeError, UsageError
from globe.runs.store import differences

FOLDER = ".globe-heal"
_KEY, _WINDOWS, _STATE = "key.json", "windows.pt", "state.pt"


class State:
    """The folder of a healing and what it holds.

    Parameters
    ----------
    out : Path
        The factored directory.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER

    def open(self, key: Mapping[str, Any], *, fresh: bool) -> None:
        """Make the folder for a healing of this key, or find it.

        Raises
        ------
        UsageError
            If it holds a healing of another key and is not to be started over.
        """
        plain = json.loads(json.dumps(key))
        if not fresh and (self.folder / _KEY).exists():
            different = differences(_read_key(self.folder / _KEY), plain)
            if different:
                raise UsageError(
                    f"{self.folder} holds a healing of other options or texts: {', '.join(different[:6])}; give the "
                    "same, or --fresh to start over"
                )
            return
        self.remove()
        self.folder.mkdir()
        write_text(self.folder / _KEY, json.dumps(plain, indent=1) + "\n")

    def windows(self) -> dict[str, Any] | None:
        """The windows that were read, if they were."""
        return self._load(_WINDOWS)

    def save_windows(self, windows: dict[str, Any]) -> None:
        """Keep the windows."""
        self._save(_WINDOWS, windows)

    def progress(self) -> dict[str, Any] | None:
        """Parameters, the optimiser's state and counts of the last checkpoint, if there is one."""
        return self._load(_STATE)

    def save_progress(self, progress: dict[str, Any]) -> None:
        """Take the place of the last checkpoint."""
        self._save(_STATE, progress)

    def remove(self) -> None:
        """Remove the folder, its key first."""
        (self.folder / _KEY).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise types of their own
            raise GlobeError(f"{path}: damaged ({type(error).__name__}); use --fresh to start over") from None
        return found

    def _save(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        temporary = path.with_name(f".{name}.partial")
        with temporary.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _read_key(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        raise GlobeError(f"{path}: damaged; use --fresh to start over") from None
    return found
