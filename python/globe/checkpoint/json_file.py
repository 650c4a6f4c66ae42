"""JSON files that hold an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from globe.errors import GlobeError


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises
    ------
    GlobeError
        If it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GlobeError(f"{path}: cannot be read ({error.strerror}); expected a JSON file: fetch it") from None
    except (ValueError, RecursionError) as error:
        raise GlobeError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise GlobeError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch the file again")
    return value
