"""What is refused, or told, before an output directory is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from globe.artifact.factored import MANIFEST
from globe.artifact.owned import LOCK, Claim, outlook, present, some, staying
from globe.checkpoint.shards import INDEX_NAME, SINGLE
from globe.errors import GlobeError, UsageError
from globe.runs.store import FOLDER, Log, differences


def refuse_other_files(path: Path, going: set[str]) -> None:
    """Refuse a directory that is not empty."""
    if any(entry.name != LOCK for entry in path.iterdir()):
        finished = (path / "config.json").exists()
        what = "a finished checkpoint" if finished else "an unfinished run or other files"
        raise UsageError(
            f"output {path} is not empty ({what}; {outlook(path, going)}); use --overwrite to replace what would go, "
            "or name another directory"
        )


def refuse_other_key(
    path: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], going: set[str]
) -> None:
    """Refuse a directory that holds something of another key."""
    different = differences(found, wanted)
    if different:
        shown = ", ".join(different[:6]) + (f", and {len(different) - 6} more" if len(different) > 6 else "")
        raise UsageError(
            f"output {path} holds {what} of another source or other settings: {shown}; use --fresh to start over "
            f"({outlook(path, going)}), or name another directory"
        )


def refuse_rivals(path: Path, claim: Claim, going: set[str]) -> None:
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


def refuse_reads(path: Path, claim: Claim, going: set[str]) -> None:
    """Refuse to read what this run is about to remove."""
    for file in claim.reads:
        place = file.resolve()
        doomed = {(path / name).resolve() for name in going}
        if place in doomed or (path / FOLDER).resolve() in place.parents:
            raise UsageError(
                f"calibrate is {str(file)!r}, which is among the files of output {path} that are removed; move it "
                "elsewhere first, or name another directory"
            )


def tell_staying(path: Path, going: set[str], log: Log) -> None:
    """Say which files are left as they are."""
    stays = staying(path, going)
    if stays:
        log(f"{path}: left as they are: {some(stays)}")


def require_space(path: Path, claim: Claim, going: set[str]) -> None:
    """Refuse a disk without room for what is claimed, beside what goes."""
    free, scratch = shutil.disk_usage(path).free + used(path, going), claim.scratch
    if free >= claim.all_bytes:
        return
    remedies, told = "free some or name another disk", ""
    if scratch is not None:
        told = f", {scratch.size:,} of them for matrices of experts that the joint fit has no memory for"
        remedies += f", or use {scratch.remedies}" if free >= claim.needed_bytes else ""
    raise GlobeError(f"output {path}: {free:,} bytes free, about {claim.all_bytes:,} needed{told}; {remedies}")


def used(path: Path, names: set[str]) -> int:
    """Bytes of what GloBE wrote."""
    files = [*present(path, names), *(path / FOLDER).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())
