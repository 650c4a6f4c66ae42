"""What lies in a checkpoint directory beside its weights: what goes along, and what is left behind by name."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

LOADER_FILE = "modeling_globe.py"
SETTINGS_FILE = "globe-settings.yaml"
REPORT = "report.html"
HELD_OUT = "globe-held-out.json"
EVALUATION = "evaluation.json"
# Written by GloBE, whatever the source has under these names.
OWN = (
    "config.json",
    "globe.json",
    "metrics.json",
    "README.md",
    LOADER_FILE,
    SETTINGS_FILE,
    REPORT,
    HELD_OUT,
    EVALUATION,
)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
_REPLACED = {"config.json", "globe.json", "README.md", LOADER_FILE}  # by what says the same of the output
_RUNS = "runs"  # of trackers
_MOST_BYTES, _MOST_FILES = 64 << 20, 1000  # of a folder that goes along


@dataclass(frozen=True)
class Companions:
    """Files that go along, as paths relative to the directory, and what is left behind: names and reasons."""

    carried: tuple[str, ...]
    left: tuple[str, ...]


def companions(source: Path, weights: frozenset[str] = frozenset()) -> Companions:
    """The tokenizer and other small files and folders: all but weights and what GloBE writes itself.

    Hidden files and indices of weights are neither carried nor named; of the files in `weights`, which are read as the
    checkpoint, nothing is said.
    """
    carried: list[str] = []
    left: list[str] = []
    for entry in sorted(source.iterdir()):
        name = entry.name
        if name.startswith(".") or name.endswith(".index.json") or name in weights:
            continue
        if entry.is_symlink() and not entry.exists():
            left.append(f"{name} (a link to nothing)")
        elif entry.is_dir():
            files, reason = _folder(entry)
            carried += [] if reason else [f"{name}/{file}" for file in files]
            left += [f"{name}/ ({reason})"] if reason else []
        elif name in OWN:
            left += [] if name in _REPLACED else [f"{name} (GloBE writes its own)"]
        elif entry.suffix in _WEIGHTS:
            left.append(name)
        elif entry.is_file():
            carried.append(name)
    return Companions(tuple(carried), tuple(left))


def copy_companions(source: Path, target: Path) -> None:
    """Copy what goes along, each file under a temporary name first."""
    for name in companions(source).carried:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.partial")
        shutil.copyfile(source / name, temporary)
        temporary.replace(place)


def _folder(folder: Path) -> tuple[list[str], str]:
    """The files of a folder that goes along, or why it does not."""
    if folder.name == _RUNS:
        return [], "histories of trackers"
    files: list[str] = []
    size = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            file = Path(place) / name
            if name.startswith("."):
                continue
            if file.suffix in _WEIGHTS:
                return [], "weights"
            if not file.is_file():
                return [], f"{name} is a link to nothing"
            size += file.stat().st_size
            files.append(file.relative_to(folder).as_posix())
            if size > _MOST_BYTES or len(files) > _MOST_FILES:
                return [], f"over {_MOST_BYTES >> 20} MiB or {_MOST_FILES} files"
    return files, ""
