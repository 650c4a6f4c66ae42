"""GloBE: mixture-of-experts compression with one global bank of atoms.

Every routed expert matrix W_i (p × d) becomes A_i · Σ_j α_ij B_j: a left factor of its own, sparse
non-negative codes, and a bank of atoms that all experts of all layers share.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from globe.waiting import wait_passively

wait_passively()  # before anything below imports NumPy or torch

__version__ = "0.1.0"

_HOMES = {
    "GlobeError": "globe.errors",
    "UsageError": "globe.errors",
    "Settings": "globe.settings",
    "Result": "globe.compress",
    "batch": "globe.batch",
    "calibrate": "globe.calibrate",
    "compare": "globe.compare",
    "compress": "globe.compress",
    "evaluate": "globe.evaluate",
    "export": "globe.export",
    "get_cmake_dir": "globe.embedding",
    "inspect": "globe.inspect",
    "load": "globe.hf.load",
    "report": "globe.report",
    "push": "globe.push",
}

if TYPE_CHECKING:
    from globe.batch import batch as batch
    from globe.calibrate import calibrate as calibrate
    from globe.compare import compare as compare
    from globe.compress import Result as Result
    from globe.compress import compress as compress
    from globe.embedding import get_cmake_dir as get_cmake_dir
    from globe.errors import GlobeError as GlobeError
    from globe.errors import UsageError as UsageError
    from globe.evaluate import evaluate as evaluate
    from globe.export import export as export
    from globe.hf.load import load as load
    from globe.inspect import inspect as inspect
    from globe.push import push as push
    from globe.report import report as report
    from globe.settings import Settings as Settings

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'globe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Where a stage's module bears its function's name, the function wins, however the module came to be imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
