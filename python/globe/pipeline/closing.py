"""The end of a compression: metrics.json and the files beside the weights, config.json last; then the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from globe._version import __version__
from globe.artifact.autoload import LOADER, loading_config
from globe.artifact.card import model_card, settings_file
from globe.artifact.factored import INDEX_FILE, MANIFEST
from globe.artifact.manifest import manifest
from globe.artifact.write import Written
from globe.checkpoint.companions import HELD_OUT, LOADER_FILE, REPORT, SETTINGS_FILE, copy_companions
from globe.checkpoint.family import Family
from globe.checkpoint.json_file import read_json
from globe.checkpoint.tensorfile import write_text
from globe.choice.plan import Plan
from globe.compute import ranks
from globe.correction.down import Corrections
from globe.errors import GlobeError
from globe.fit.stored_lefts import Fit
from globe.pipeline.metrics import families_report, stored_report
from globe.pipeline.opening import Opened, environment
from globe.report import report as draw
from globe.runs.job import Job
from globe.sizes.pools import storage
from globe.sizes.ratios import Ratios, ratios
from globe.statistics.calibration import Calibration
from globe.statistics.held_out import HeldOut


@dataclass(frozen=True)
class Made:
    """What a compression has made: the plan with its final sizes, and by pool the fits and what is said of them.

    `seen` is what a ratio was planned by, `corrected` what was done beside the fits.
    """

    plan: Plan
    calibration: Calibration | None
    fits: dict[str, Fit]
    reports: dict[str, dict[str, Any]]
    seen: dict[str, Any] | None = None
    corrected: Corrections | None = None

    @property
    def changed(self) -> dict[str, str]:
        """The tensors beside the factors that are not the source's, each with the result that has it."""
        return self.corrected.tensors if self.corrected is not None else {}


def describe(opened: Opened, made: Made, written: Written, job: Job) -> dict[str, Any]:
    """What metrics.json says."""
    reports = {
        name: _with_stored(report, stored_report(name, made.fits[name], written))
        for name, report in made.reports.items()
    }
    told = environment(made.plan, job.settings)
    return {
        "globe_version": __version__,
        **families_report(job.settings.families, reports, made.fits, written),
        **({"plan": made.seen} if made.seen is not None else {}),
        "ratio": asdict(_ratios(made)),
        "bits": {**storage(job.settings).bits, "group": job.settings.group_size},
        "bytes": _bytes(made.plan, written),
        "files": written.files,
        "ranks": ranks.size(),
        **{key: told[key] for key in ("device", "threads", "precision", "blocks")},
        "settings": job.settings.as_dict(),
        "source": opened.described(),
        "calibration": made.calibration.about if made.calibration is not None else None,
        "corrections": [asdict(layer) for layer in made.corrected.layers] if made.corrected is not None else None,
        "stages": _with_passes(job.stages.as_list(), made.plan.families),
    }


def publish(target: Path, opened: Opened, made: Made, metrics: dict[str, Any], job: Job) -> None:
    """Write everything but the weights; config.json, which makes the directory whole, comes last."""
    planned, checkpoint = made.plan, made.plan.checkpoint
    copy_companions(checkpoint.directory, target)
    told = manifest(checkpoint, planned.families, planned.shapes, job.settings, (opened.described(), made.changed))
    _write_json(target / MANIFEST, told)
    _write_json(target / "metrics.json", metrics)
    write_text(target / "README.md", model_card(opened.source, checkpoint.config, metrics))
    write_text(target / SETTINGS_FILE, settings_file(metrics))
    write_text(target / LOADER_FILE, LOADER)
    if made.calibration is not None:
        write_text(target / HELD_OUT, HeldOut.of(made.calibration).text())
    decoded = [matrix.name for matrix in checkpoint.encoded]
    _write_json(target / "config.json", loading_config(checkpoint.config, told, INDEX_FILE, decoded))


def draw_report(target: Path, log: Callable[[str], None]) -> None:
    """Draw the report of an output that is whole, which it stays whatever becomes of the report."""
    try:
        draw(target)
    except Exception as error:
        log(f"{target}: finished, but its report could not be drawn ({type(error).__name__}: {error})")


def finished(target: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """metrics.json of an output that is there already, its weight files looked for; the report if it has none.

    Raises
    ------
    GlobeError
        If a weight file is missing or of another size.
    """
    log(f"{target} is finished already, with this source and these settings; nothing to do")
    metrics = read_json(target / "metrics.json")
    for name, file in metrics.get("files", {}).items():
        path = target / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise GlobeError(
                f"{path}: missing or not of the {file['bytes']:,} bytes that metrics.json states, in an output that "
                "is otherwise finished; use --fresh to make it again"
            )
    if not (target / REPORT).exists():
        draw_report(target, log)
    return metrics


def _with_stored(report: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A pool's report with what is measured on the factors as stored; without loops these are the seeds."""
    init = report["init"]
    if init["relative_error"] is None:
        init = {**init, "relative_error": stored["relative_error"]}
    return {**report, "init": init, **stored}


def _ratios(made: Made) -> Ratios:
    """With the codes that are stored."""
    stored = {
        name: replace(shape, nonzeros=int(np.count_nonzero(made.fits[name].state.codes)))
        for name, shape in made.plan.shapes.items()
    }
    return ratios(made.plan.checkpoint, made.plan.families, stored)


def _bytes(planned: Plan, written: Written) -> dict[str, int]:
    return {
        "touched": sum(family.stored_bytes for family in planned.families.values()),
        "experts": planned.checkpoint.expert_bytes(),
        "checkpoint": sum(info.nbytes for info in planned.checkpoint.tensors.values()),
        "stored": sum(file["bytes"] for file in written.files.values()),
    }


def _with_passes(records: list[dict[str, Any]], families: dict[str, Family]) -> list[dict[str, Any]]:
    """The stages of a family with the passes over it that their bytes make."""
    for record in records:
        family = families.get(record["name"].partition(":")[0])
        if family is not None:
            record["passes"] = record["bytes_read"] / family.stored_bytes
    return records


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
