"""Ask the system to have tensors at hand before they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from globe.checkpoint.tensorfile import TensorInfo
from globe.errors import GlobeError


def read_soon(tensors: Iterable[TensorInfo]) -> None:
    """Let the system read tensors into its cache meanwhile, where it can be asked to; nothing waits for it.

    Raises
    ------
    GlobeError
        If a file cannot be opened.
    """
    advise = getattr(os, "posix_fadvise", None)  # macOS has none
    if advise is None:
        return
    of_file: dict[Path, list[TensorInfo]] = {}
    for info in tensors:
        of_file.setdefault(info.file, []).append(info)
    for path, infos in of_file.items():
        try:
            with path.open("rb") as file:
                for info in infos:
                    advise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise GlobeError(f"{path}: cannot be read ({error.strerror})") from None
