"""Settings from YAML files and options, one on top of the other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from globe.errors import UsageError
from globe.settings import SIZES, Settings


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 and people do; to YAML 1.1 it is a string without the dot."""


_EXPONENT = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_settings(path: Path | None, overrides: dict[str, Any]) -> Settings:
    """Settings from a YAML file (or the defaults), with `overrides` on top.

    Raises
    ------
    UsageError
        If the file cannot be read, or a key or value is not a setting's.
    """
    given = [name for name in SIZES if overrides.get(name) is not None]
    if overrides.get("ratio") is not None and given:
        raise UsageError(f"ratio and {given[0]} are both given; ratio plans rank and bank size: leave one out")
    return merge_settings(read_yaml(path, "config") if path is not None else {}, overrides)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file; `what` it is goes into errors.

    Raises
    ------
    UsageError
        If the file cannot be read, or holds something else.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{what} {path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict | None):
        raise UsageError(f"{what} {path}: expected keys and values, found {type(loaded).__name__}")
    return dict(loaded or {})


def merge_settings(*layers: Mapping[str, Any]) -> Settings:
    """Settings from keys and values, later layers on top of earlier ones.

    Raises
    ------
    UsageError
        If a key or value is not a setting's.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        for name, other in (("bank_size", "bank_ratio"), ("bank_ratio", "bank_size")):
            if layer.get(name) is not None:
                values.pop(other, None)
        if layer.get("ratio") is not None:
            values = {key: value for key, value in values.items() if key not in SIZES}
        elif any(layer.get(name) is not None for name in SIZES):
            values.pop("ratio", None)
        values.update(layer)
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in values:
        if key not in known:
            raise UsageError(f"config key {key!r} is not a setting; expected one of {', '.join(sorted(known))}")
    if isinstance(values.get("families"), str):
        values["families"] = values["families"].split(",")
    return Settings(**values)
