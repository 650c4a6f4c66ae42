"""The pipeline: a checkpoint directory in, a factored directory out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from globe._version import __version__
from globe.artifact.autoload import LOADER, loading_config
from globe.artifact.card import model_card, settings_file
from globe.artifact.factored import INDEX_FILE, MANIFEST
from globe.artifact.manifest import manifest
from globe.artifact.output import finished_key, run_directory, run_key
from globe.artifact.owned import Claim, factored_names
from globe.artifact.write import Written, write_weights
from globe.checkpoint.companions import LOADER_FILE, REPORT, SETTINGS_FILE, companions, copy_companions
from globe.checkpoint.index import Family, read_json
from globe.checkpoint.quantised import KEY, quantised_dtypes
from globe.checkpoint.quantised import told as told_quantised
from globe.checkpoint.tensorfile import write_text
from globe.choice.plan import Plan, plan, plan_sizes, usual_size
from globe.choice.seeding import seed
from globe.compute.devices import check_device, keep_memory, set_threads
from globe.compute.gemm import pick_precision, precision_report, working_precision
from globe.errors import GlobeError
from globe.fit.stages import alternate, fit_jointly, fit_report, load_fit
from globe.fit.stored_lefts import Fit
from globe.pipeline.metrics import families_report, stored_report
from globe.report import report as draw
from globe.runs.job import Job
from globe.runs.stages import Display, Stages
from globe.runs.store import FOLDER
from globe.runs.tracking import require_tracker, track
from globe.seeds.pool import pool_of
from globe.seeds.proxies import scan_family
from globe.settings import Settings
from globe.sizes.ratios import Ratios, Shape, ratios, stored_elements
from globe.statistics.calibrate import calibration_for, is_file, named_calibration
from globe.statistics.memory import require_memory
from globe.statistics.metric import build_metric


@dataclass(frozen=True)
class Result:
    """A finished compression: where it lies, what metrics.json says, and the three ratios.

    `found` where it was finished before and nothing had to be done.
    """

    directory: Path
    metrics: dict[str, Any]
    ratio: Ratios
    found: bool = False


def compress(
    model_dir: Path | str,
    out_dir: Path | str,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    keep_run: bool = False,
    log: str | None = None,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Result:
    """Factor the routed experts of a checkpoint: W_i ≈ A_i Σ_j α_ij B_j with one bank per family.

    Every stage leaves its result in OUT/.globe-run, and the same call after a run that was stopped goes on from
    there: the weight files are the same to the bit. Where OUT is finished already, its result is returned.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory of a known layout.
    out_dir : Path or str
        The factored directory; made here. config.json is renamed into place last; then report.html is drawn.
    settings : Settings, optional
        Defaults of the specification, section M.
    overwrite : bool
        Replace the files of an output that is not empty: those of the names that are written now, and those that
        GloBE's records there name. Others stay.
    fresh : bool
        Start over where an earlier compression left an unfinished run or its output.
    keep_run : bool
        Keep OUT/.globe-run at the end.
    log : {"trackio", "wandb", "tensorboard"}, optional
        Write the histories of metrics.json to this tracker too, at the end.
    trust_remote_code : bool
        Run Python code that the source brings with it (`auto_map`); without, it is not calibrated on.
    progress : Display, optional
        Shows stages and lines as they go.

    Returns
    -------
    Result

    Raises
    ------
    UsageError
        If a setting does not fit the checkpoint or saves nothing, or OUT holds something else.
    GlobeError
        If the checkpoint, the output directory or the tracker cannot be used.
    """
    if log is not None:
        require_tracker(log)
    result = _compress(model_dir, out_dir, settings, overwrite, fresh, keep_run, trust_remote_code, progress)
    if log is not None:
        track(log, result.directory, result.metrics)
    return result


def _compress(
    model_dir: Path | str,
    out_dir: Path | str,
    settings: Settings | None,
    overwrite: bool,
    fresh: bool,
    keep_run: bool,
    trust_remote_code: bool,
    progress: Display | None,
) -> Result:
    settings, source, target = settings or Settings(), Path(model_dir), Path(out_dir)
    stages = Stages(progress)
    with stages.stage("index", 1):
        planned = plan(source, settings)
        for line in planned.checkpoint.notes:
            stages.display.log(line)
        set_threads(settings.threads)
        keep_memory()
        check_device(planned.device)
        require_memory(planned.checkpoint, settings)
        dtypes = [info.dtype for info in planned.checkpoint.tensors.values()]
        if quantised_dtypes(dtypes):
            stages.display.log(
                f"{source}: {told_quantised(dtypes, planned.checkpoint.config.get(KEY))}: kept as they are"
            )
        fingerprint = planned.checkpoint.fingerprint()
        environment = {
            "device": str(planned.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "blocks": asdict(planned.blocks),
            "precision": precision_report(settings.precision, planned.device),
        }
    key = run_key(__version__, fingerprint, settings.as_dict())
    if overwrite or fresh or finished_key(target) != key:
        named_calibration(planned.checkpoint, settings.calibrate)  # before anything is removed or made
    opened = run_directory(
        target,
        source,
        _claim(planned, settings),
        key,
        environment,
        fresh=fresh,
        overwrite=overwrite,
        keep_run=keep_run,
        log=stages.display.log,
    )
    with working_precision(pick_precision(settings.precision, planned.device)), opened as store:
        if store is None:
            stages.display.log(f"{target} is finished already, with this source and these settings; nothing to do")
            found = _finished(target)
            if not (target / REPORT).exists():
                _draw_report(target, stages.display.log)
            return found
        job = Job(settings, planned.device, planned.blocks, stages, store)
        # All before the first is trained: a bad tensor ends it early.
        scans = {name: scan_family(family, job) for name, family in planned.families.items()}
        planned = usual_size(planned, scans)
        seen: dict[str, Any] | None = None
        if settings.ratio is not None:
            planned, seen = plan_sizes(planned, scans, job)
            job = replace(job, blocks=planned.blocks)
            environment["blocks"] = asdict(planned.blocks)
        calibration = calibration_for(
            planned.checkpoint,
            settings.calibrate,
            target / FOLDER,
            stages,
            tokens=settings.calibration_tokens,
            device=str(planned.device),
            trust_remote_code=trust_remote_code,
        )
        reports, pools = {}, {}
        for name, family in planned.families.items():
            metric = build_metric(family, calibration, settings, planned.device) if calibration is not None else None
            pool = pool_of(family, planned.shapes[name], scans[name], settings, metric)
            alternate(pool, seed(pool, job), job, measured=False)
            fit_jointly(pool, job)
            pools[name], reports[name] = pool, fit_report(pool, job)
        fits = {name: load_fit(pool, job) for name, pool in pools.items()}
        written = write_weights(planned.checkpoint, fits, target, job)
        for name, report in reports.items():
            report.update(stored_report(name, fits[name], written))
            if report["init"]["relative_error"] is None:  # no loops: what is written are the seeds
                report["init"]["relative_error"] = report["relative_error"]
        actual = _actual_ratios(planned, fits)
        described = {"path": str(model_dir), "layout": planned.checkpoint.layout.name, "fingerprint": fingerprint}
        metrics = {
            "globe_version": __version__,
            **families_report(settings.families, reports, fits, written),
            **({"plan": seen} if seen is not None else {}),
            "ratio": asdict(actual),
            "bytes": _bytes(planned, written),
            "files": written.files,
            "device": environment["device"],
            "threads": environment["threads"],
            "precision": environment["precision"],
            "blocks": environment["blocks"],
            "settings": settings.as_dict(),
            "source": described,
            "calibration": calibration.about if calibration is not None else None,
            "stages": _with_passes(stages.as_list(), planned.families),
        }
        copy_companions(planned.checkpoint.directory, target)
        told = manifest(planned.checkpoint, planned.families, planned.shapes, settings, described)
        _write_json(target / MANIFEST, told)
        _write_json(target / "metrics.json", metrics)
        write_text(target / "README.md", model_card(source, planned.checkpoint.config, metrics))
        write_text(target / SETTINGS_FILE, settings_file(metrics))
        write_text(target / LOADER_FILE, LOADER)
        _write_json(target / "config.json", loading_config(planned.checkpoint.config, told, INDEX_FILE))
    _draw_report(target, stages.display.log)
    return Result(target, metrics, actual)


def _draw_report(target: Path, log: Callable[[str], None]) -> None:
    """Write the report of an output that is whole, which it stays whatever becomes of the report."""
    try:
        draw(target)
    except Exception as error:
        log(f"{target}: finished, but its report could not be drawn ({type(error).__name__}: {error})")


def _finished(target: Path) -> Result:
    metrics = read_json(target / "metrics.json")
    for name, file in metrics.get("files", {}).items():
        path = target / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise GlobeError(
                f"{path}: missing or not of the {file['bytes']:,} bytes that metrics.json states, in an output that "
                "is otherwise finished; use --fresh to make it again"
            )
    return Result(target, metrics, Ratios(**metrics["ratio"]), found=True)


def _claim(planned: Plan, settings: Settings) -> Claim:
    """What the run writes into its output directory, the bytes that this takes, and the calibration that it reads."""
    checkpoint = planned.checkpoint
    shards = [shard.path.name for shard in checkpoint.shards]
    reads = (Path(settings.calibrate),) if is_file(settings.calibrate) else ()
    return Claim(factored_names(shards, companions(checkpoint.directory).carried), _needed_bytes(planned), reads)


def _needed_bytes(planned: Plan) -> int:
    """Disk that a run takes: three banks in fp32 while one family is trained, or the output; and all factors."""
    families, shapes = planned.families, planned.shapes
    everything = sum(info.nbytes for info in planned.checkpoint.tensors.values())
    touched = sum(family.stored_bytes for family in families.values())
    output = everything - touched + 2 * sum(stored_elements(families[name], shapes[name]) for name in families)
    banks = [shapes[name].bank * shapes[name].rank * family.d for name, family in families.items()]
    return 2 * sum(banks) + max(output, 3 * 4 * max(banks))


def _with_passes(records: list[dict[str, Any]], families: dict[str, Family]) -> list[dict[str, Any]]:
    """The stages of a family with the passes over it that their bytes make."""
    for record in records:
        family = families.get(record["name"].partition(":")[0])
        if family is not None:
            record["passes"] = record["bytes_read"] / family.stored_bytes
    return records


def _actual_ratios(planned: Plan, fits: dict[str, Fit]) -> Ratios:
    stored = {
        name: Shape(shape.rank, shape.bank, int(np.count_nonzero(fits[name].state.codes)))
        for name, shape in planned.shapes.items()
    }
    return ratios(planned.checkpoint, planned.families, stored)


def _bytes(planned: Plan, written: Written) -> dict[str, int]:
    return {
        "touched": sum(family.stored_bytes for family in planned.families.values()),
        "experts": planned.checkpoint.expert_bytes(),
        "checkpoint": sum(info.nbytes for info in planned.checkpoint.tensors.values()),
        "stored": sum(file["bytes"] for file in written.files.values()),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
