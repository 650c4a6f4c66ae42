"""GloBE: mixture-of-experts compression with one global bank of atoms.

Every routed expert matrix W_i (p × d) becomes A_i · Σ_j α_ij B_j: a left factor of its own, sparse
non-negative codes, and a bank of atoms that all experts of all layers share.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from globe._version import __version__ as __version__
from globe.machine.waiting import wait_passively

wait_passively()  # before anything below imports NumPy or torch

_HOMES = {
    "GlobeError": "globe.errors",
    "UsageError": "globe.errors",
    "Settings": "globe.settings",
    "Result": "globe.pipeline.compress",
    "batch": "globe.pipeline.batch",
    "calibrate": "globe.statistics.calibrate",
    "compare": "globe.pipeline.compare",
    "compress": "globe.pipeline.compress",
    "evaluate": "globe.evaluation.evaluate",
    "export": "globe.artifact.export",
    "get_cmake_dir": "globe.embedding",
    "Healing": "globe.healing.options",
    "heal": "globe.healing.heal",
    "inspect": "globe.choice.inspect",
    "load": "globe.hf.load",
    "report": "globe.report",
    "push": "globe.artifact.push",
}

if TYPE_CHECKING:
    from globe.artifact.export import export as export
    from globe.artifact.push import push as push
    from globe.choice.inspect import inspect as inspect
    from globe.embedding import get_cmake_dir as get_cmake_dir
    from globe.errors import GlobeError as GlobeError
    from globe.errors import UsageError as UsageError
    from globe.evaluation.evaluate import evaluate as evaluate
    from globe.healing.heal import heal as heal
    from globe.healing.options import Healing as Healing
    from globe.hf.load import load as load
    from globe.pipeline.batch import batch as batch
    from globe.pipeline.compare import compare as compare
    from globe.pipeline.compress import Result as Result
    from globe.pipeline.compress import compress as compress
    from globe.report import report as report
    from globe.settings import Settings as Settings
    from globe.statistics.calibrate import calibrate as calibrate

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
