"""Where C++ projects find the library that this package carries."""

from __future__ import annotations

import sys
from pathlib import Path

from globe.errors import GlobeError


def get_cmake_dir() -> str:
    """Return the directory that holds globeConfig.cmake.

    Pass it to CMake as ``-Dglobe_DIR=...``; ``find_package(globe)`` then defines the target ``globe::globe``.

    Raises
    ------
    GlobeError
        If this installation of the package does not carry the C++ library.
    """
    roots = sys.modules["globe"].__path__  # two in an editable install
    places = [Path(root) / "lib" / "cmake" / "globe" for root in roots]
    for place in places:
        if (place / "globeConfig.cmake").is_file():
            return str(place)
    raise GlobeError(
        f"globeConfig.cmake: not found in {' or '.join(map(str, places))}; expected the C++ library there; "
        "install the package again with pip"
    )
