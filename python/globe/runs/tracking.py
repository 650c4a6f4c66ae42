"""The histories of metrics.json in an experiment tracker: TensorBoard, trackio or Weights & Biases."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from globe.errors import GlobeError, UsageError

Points = dict[int, dict[str, float]]
TENSORBOARD_FOLDER = Path("runs", "globe")  # in OUT, where the hub looks for it


def points(metrics: Mapping[str, Any]) -> Points:
    """What metrics.json says, as figures by name at a step.

    The loops are `{family}/loops/…` at the number of the loop, the joint fit is `{family}/joint/…` at its step, and
    what is measured on the factors as stored is `final/…` at the last step.
    """
    found: Points = {}
    families = metrics.get("pools", metrics["families"])
    for name, family in families.items():
        _add(found, f"{name}/loops", family["history"], "loop")
        _add(found, f"{name}/joint", (family.get("joint") or {}).get("history", []), "step")
    last = found.setdefault(max(found, default=0), {})
    for name, family in metrics["families"].items():
        for key in ("relative_error", "weighted_error", "support_median"):
            if family.get(key) is not None:
                last[f"final/{name}/{key}"] = float(family[key])
    last.update({f"final/ratio/{axis}": float(share) for axis, share in metrics["ratio"].items()})
    return dict(sorted(found.items()))


def _add(found: Points, prefix: str, records: list[dict[str, Any]], counter: str) -> None:
    for record in records:
        figures = {f"{prefix}/{key}": float(value) for key, value in record.items() if _is_figure(key, value, counter)}
        found.setdefault(record[counter], {}).update(figures)


def _is_figure(key: str, value: object, counter: str) -> bool:
    return key != counter and isinstance(value, int | float) and not isinstance(value, bool)


def require_tracker(name: str) -> None:
    """Refuse a tracker that is not known or whose package is missing; called before hours of computing.

    Raises
    ------
    UsageError
        If `name` is no tracker.
    GlobeError
        If its package cannot be imported.
    """
    if name not in TRACKERS:
        raise UsageError(f"log is {name!r}; expected one of {', '.join(TRACKERS)}")
    module = _MODULES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise GlobeError(f'--log {name} needs {name} ({error}): pip install "globe-moe[{name}]"') from error


def track(name: str, out: Path, metrics: Mapping[str, Any]) -> None:
    """Write the histories of a finished compression to a tracker; once more replaces or adds a run of the same name.

    Raises
    ------
    GlobeError
        If the tracker fails; `out` is whole all the same.
    """
    require_tracker(name)
    try:
        TRACKERS[name](out, metrics["settings"], points(metrics))
    except Exception as error:  # of the tracker
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise GlobeError(f"{out} is finished, but --log {name} failed: {told}; the same command logs again") from error


def _tensorboard(out: Path, settings: Mapping[str, Any], found: Points) -> None:
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    folder = out / TENSORBOARD_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    with tensorboard.SummaryWriter(str(folder)) as writer:
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        writer.add_text("settings", f"| key | value |\n| --- | --- |\n{rows}")
        for step, figures in found.items():
            for key, value in figures.items():
                writer.add_scalar(key, value, step)


def _trackio(out: Path, settings: Mapping[str, Any], found: Points) -> None:
    trackio = importlib.import_module("trackio")
    trackio.init(project="globe", name=out.resolve().name, config=dict(settings))
    for step, figures in found.items():
        trackio.log(figures, step=step)
    trackio.finish()


def _wandb(out: Path, settings: Mapping[str, Any], found: Points) -> None:
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="globe", name=out.resolve().name, config=dict(settings))
    for step, figures in found.items():
        run.log(figures, step=step)
    run.finish()


_MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], Points], None]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
