"""A checkpoint directory in, a factored directory out: the specification from A to K, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from globe.artifact.run_directory import Existing, finished_key, shared_directory
from globe.artifact.write import write_weights
from globe.checkpoint.hub import local
from globe.choice.plan import Plan, plan_sizes, usual_size
from globe.choice.seeding import seed
from globe.compute import ranks
from globe.correction.down import correct, correction_text
from globe.fit.stages import alternate, fit_jointly, fit_report, load_fit, round_fit
from globe.pipeline.closing import Made, describe, draw_report, finished, publish
from globe.pipeline.opening import Opened, open_alike
from globe.pipeline.schedule import Schedule, done_stages, measured, schedule
from globe.runs.alike import require_alike
from globe.runs.job import Job
from globe.runs.stages import Display, Stages
from globe.runs.store import FOLDER
from globe.runs.tracking import require_tracker, track
from globe.runs.turn import Turn
from globe.seeds.pool import Pool, pool_of
from globe.seeds.proxies import Scan, scan_family
from globe.settings import Settings
from globe.sizes.ratios import Ratios
from globe.statistics.calibrate import STATISTICS, calibration_for, named_calibration
from globe.statistics.calibration import Calibration
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


@ranks.joined()
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
    began: float | None = None,
) -> Result:
    """Factor the routed experts of a checkpoint: W_i ≈ A_i Σ_j α_ij B_j with one bank per family.

    Every stage leaves its result in OUT/.globe-run, and the same call after a run that was stopped goes on from
    there: the weight files are the same to the bit, unless there is a time limit. Where OUT is finished already, its
    result is returned.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory of a known layout, or its name on the hub (NAMESPACE/NAME, with @REVISION).
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
    began : float, optional
        When `time.perf_counter` said that the command began, of which `time_limit` counts; now if not given.

    Returns
    -------
    Result

    Raises
    ------
    UsageError
        If a setting does not fit the checkpoint or saves nothing, or OUT holds something else; or a time limit does
        not allow one pass.
    GlobeError
        If the checkpoint, the output directory or the tracker cannot be used.
    """
    existing = Existing(fresh, overwrite, keep_run)
    require_alike({**asdict(existing), "log": log, "trust_remote_code": trust_remote_code}, {})
    if log is not None:
        require_tracker(log)
    settings, stages = settings or Settings(), Stages(progress if ranks.rank() == 0 else None)
    began = began if began is not None else perf_counter()
    opened = open_alike(local(model_dir), settings, stages, trust_remote_code=trust_remote_code)
    turn = Turn(ranks.agreed(began) + settings.time_limit, ranks.clock) if settings.time_limit is not None else None
    run = Run(opened, Path(out_dir), settings, existing, turn)
    result = _run(run, stages)
    if log is not None:
        ranks.lead(partial(track, log, result.directory, result.metrics))
    return result


@dataclass(frozen=True)
class Run:
    """What is compressed, where to, how, what becomes of what is there, and by when."""

    opened: Opened
    target: Path
    settings: Settings
    existing: Existing
    turn: Turn | None


def _run(run: Run, stages: Stages) -> Result:
    opened, target, settings, existing = run.opened, run.target, run.settings, run.existing
    identity, planned, show = opened.identity(settings), opened.plan, stages.display.log
    timed: Schedule | None = None
    if existing.overwrite or existing.fresh or ranks.agreed(finished_key(target)) != identity.key:
        with ranks.together():
            named_calibration(planned.checkpoint, settings.calibrate)  # before anything is removed or made
        timed = ranks.agreed(schedule(run.turn, planned, settings))
        if timed is not None:
            anew = existing.overwrite or existing.fresh
            layers = planned.checkpoint.family("down").layers
            timed.refuse(settings, set() if anew else ranks.agreed(done_stages(target / FOLDER, layers)))
    directory = shared_directory(target, opened.claim(settings), identity, existing, show)
    with directory as store:
        if store is None:
            metrics = ranks.lead(partial(finished, target, show))
            return Result(target, metrics, Ratios(**metrics["ratio"]), found=True)
        job = Job(settings, planned.device, planned.blocks, stages, store)
        scans = {name: scan_family(family, job) for name, family in planned.families.items()}
        planned, seen = _sized(usual_size(planned, scans), scans, job)
        job = replace(job, blocks=planned.blocks)
        trusted = opened.trust_remote_code
        calibration = calibration_for(planned.checkpoint, job, target / FOLDER / STATISTICS, trust_remote_code=trusted)
        text = correction_text(calibration, job)
        timed = ranks.agreed(measured(timed, planned, settings, stages))
        pools, reports = {}, {}
        for pool in _pools(planned, scans, calibration, job):
            seeds = seed(pool, job)
            job = replace(job, turn=ranks.agreed(timed.turn_of(pool.name, job)) if timed is not None else None)
            alternate(pool, seeds, job, measured=False)
            fit_jointly(pool, job)
            round_fit(pool, job)
            pools[pool.name], reports[pool.name] = pool, fit_report(pool, job)
        fits = {name: load_fit(pool, job) for name, pool in pools.items()}
        corrected = ranks.lead(partial(correct, planned.checkpoint, fits, text, job, trust_remote_code=trusted))
        made = Made(planned, calibration, fits, reports, seen, corrected)
        written = write_weights(planned.checkpoint, fits, target, job, made.changed)
        metrics = describe(opened, made, written, job)
        ranks.lead(partial(publish, target, opened, made, metrics, job))
    ranks.lead(partial(draw_report, target, show))
    return Result(target, metrics, Ratios(**metrics["ratio"]))


def _sized(planned: Plan, scans: dict[str, Scan], job: Job) -> tuple[Plan, dict[str, Any] | None]:
    """The plan, with sizes for a ratio probed if one is asked for, and what was seen."""
    if job.settings.ratio is None:
        return planned, None
    planned, seen = plan_sizes(planned, scans, job)
    return replace(planned, blocks=ranks.agreed(planned.blocks)), seen


def _pools(planned: Plan, scans: dict[str, Scan], calibration: Calibration | None, job: Job) -> Iterator[Pool]:
    """The pools one by one, each with its metric, which is made when it is its turn."""
    for name, family in planned.families.items():
        metric = None if calibration is None else build_metric(family, calibration, job.settings, job.device)
        yield pool_of(family, planned.shapes[name], scans[name], job.settings, metric)
