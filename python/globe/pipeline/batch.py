"""Many compressions, one after another or dealt to devices, from a plan that can be run again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from globe import kernels
from globe.checkpoint.hub import local
from globe.choice.plan import plan
from globe.errors import GlobeError, UsageError
from globe.pipeline.compress import compress
from globe.pipeline.dealing import Place, deal, places
from globe.runs.stages import Display, Silent
from globe.runs.tracking import require_tracker
from globe.settings import Settings
from globe.settings.yaml_file import merge_settings, read_yaml


@dataclass(frozen=True)
class Entry:
    """A checkpoint, where its factors go, and how."""

    model: Path
    out: Path
    settings: Settings


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Parameters
    ----------
    job : Entry
    status : {"done", "resumed", "found", "failed"}
        Done now, finished now from where an earlier run had left it, finished before, or failed.
    seconds : float
        Of this call.
    error : str, optional
        Why it failed.
    metrics : dict, optional
        metrics.json.
    """

    job: Entry
    status: str
    seconds: float
    error: str | None = None
    metrics: dict[str, Any] | None = None

    @property
    def experts_per_second(self) -> float | None:
        """Expert matrices over the seconds of all stages, those of earlier processes included."""
        if self.metrics is None:
            return None
        experts = sum(len(family["expert_errors"]) for family in self.metrics["families"].values())
        return float(experts / self._stage_seconds(self.metrics))

    @property
    def gb_per_second(self) -> float | None:
        """10⁹ bytes of tensors read over the seconds of all stages."""
        if self.metrics is None:
            return None
        read = sum(stage["bytes_read"] for stage in self.metrics["stages"])
        return float(read / 1e9 / self._stage_seconds(self.metrics))

    @staticmethod
    def _stage_seconds(metrics: dict[str, Any]) -> float:
        return max(1e-9, float(sum(stage["seconds"] for stage in metrics["stages"])))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        metrics = self.metrics
        return {
            "model": str(self.job.model),
            "out": str(self.job.out),
            "status": self.status,
            "seconds": self.seconds,
            "error": self.error,
            "ratio": metrics and metrics["ratio"],
            "relative_error": metrics and {name: f["relative_error"] for name, f in metrics["families"].items()},
            "experts_per_second": self.experts_per_second,
            "gb_per_second": self.gb_per_second,
        }


def read_plan(path: Path) -> list[Entry]:
    """The jobs of a plan file, each checked against its checkpoint's headers.

    Raises
    ------
    UsageError
        If the file is no plan, or a job cannot work; the job is named.
    """
    content = read_yaml(path, "plan")
    _known_keys(content, ("jobs", "defaults"), f"plan {path}")
    listed, defaults = content.get("jobs"), content.get("defaults") or {}
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"plan {path}: jobs is {listed!r}; expected a list of jobs, each with model and out")
    if not isinstance(defaults, dict):
        raise UsageError(f"plan {path}: defaults is {defaults!r}; expected settings and their values")
    jobs = []
    for number, entry in enumerate(listed, 1):
        out = f" ({entry['out']})" if isinstance(entry, dict) and "out" in entry else ""
        where = f"plan {path}: job {number}{out}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: found {entry!r}; expected model, out, and if wanted config and settings")
        try:
            jobs.append(_job(entry, defaults, path.parent))
        except GlobeError as error:
            raise UsageError(f"{where}: {error}") from None
    return jobs


def batch(
    jobs: Path | str | Iterable[Entry],
    *,
    fresh: bool = False,
    keep_run: bool = False,
    log: str | None = None,
    trust_remote_code: bool = False,
    devices: str | None = None,
    jobs_per_device: int = 1,
    progress: Display | None = None,
) -> list[Outcome]:
    """Run the jobs one after another, or dealt to devices; one that fails does not keep the others from running.

    Jobs that are finished are skipped, one that was stopped is continued.

    Parameters
    ----------
    jobs : Path, str or iterable of Entry
        A plan file, or the jobs themselves.
    fresh, keep_run, trust_remote_code : bool
        As for `compress`.
    log : {"trackio", "wandb", "tensorboard"}, optional
        As for `compress`: every job's histories; a job whose tracker fails is failed, its output finished.
    devices : str, optional
        Devices to deal the jobs to, such as ``cuda:0,cuda:1``, each job in a process of its own.
    jobs_per_device : int
        How many run on a device at a time. Processors and memory of the host are shared by all that run.
    progress : Display, optional
        Shows stages and lines as they go; of jobs that are dealt, where they run and how they ended.

    Raises
    ------
    UsageError
        Before the first job begins, if any of them cannot work, two share their output, or the tracker is missing.
    """
    if log is not None:
        require_tracker(log)
    jobs = read_plan(Path(jobs)) if isinstance(jobs, str | Path) else list(jobs)
    _check(jobs)
    display = progress or Silent()
    options = {"fresh": fresh, "keep_run": keep_run, "log": log, "trust_remote_code": trust_remote_code}
    if devices is not None:
        return _dealt(jobs, places(devices, jobs_per_device), display, options)
    threads = torch.get_num_threads()
    outcomes = []
    for number, job in enumerate(jobs, 1):
        display.log(f"job {number} of {len(jobs)}: {job.out}")
        _reset_threads(threads)  # an earlier job may have set its own
        outcome = _run(job, display, **options)
        if outcome.error is not None:
            display.log(f"job {number} of {len(jobs)} failed: {outcome.error}")
        outcomes.append(outcome)
    _reset_threads(threads)
    return outcomes


def batch_table(outcomes: list[Outcome]) -> Table:
    """A line for every job."""
    table = Table(title="jobs")
    table.add_column("out", overflow="fold")
    for column in ("status", "stored over dense", "relative error", "experts/s", "GB/s"):
        table.add_column(column, justify="left" if column == "status" else "right", no_wrap=True)
    for outcome in outcomes:
        told = outcome.as_dict()
        if outcome.metrics is None:
            table.add_row(str(outcome.job.out), outcome.status)
            continue
        ratio = "\n".join(f"{axis} {told['ratio'][axis]:.3f}" for axis in ("touched", "experts", "checkpoint"))
        errors = "\n".join(f"{name} {error:.4f}" for name, error in told["relative_error"].items())
        speeds = (f"{told['experts_per_second']:.1f}", f"{told['gb_per_second']:.3f}")
        table.add_row(str(outcome.job.out), outcome.status, ratio, errors, *speeds, end_section=True)
    return table


def _dealt(jobs: list[Entry], where: list[Place], display: Display, options: Mapping[str, Any]) -> list[Outcome]:
    """Run the jobs at these places."""
    kinds = {place.kind for place in where}
    for number, job in enumerate(jobs, 1):
        if kinds != {job.settings.device} and job.settings.device != "auto":
            told = f"device is {job.settings.device}, and jobs are dealt to {', '.join(sorted(kinds))}"
            raise UsageError(f"job {number} ({job.out}): {told}; expected auto")

    def work(number: int, job: Entry, place: Place) -> Outcome:
        display.log(f"job {number} of {len(jobs)} on {place.device}: {job.out}")
        outcome = _in_process(job, place, options)
        ended = f"failed: {outcome.error}" if outcome.error is not None else outcome.status
        display.log(f"job {number} of {len(jobs)} {ended}, {outcome.seconds:.1f} s")
        return outcome

    return deal(jobs, where, work)


def _in_process(job: Entry, place: Place, options: Mapping[str, Any]) -> Outcome:
    """Run a job in a process that sees the device of its place alone."""
    started = time.perf_counter()
    request = {"model": str(job.model), "out": str(job.out), "settings": job.settings.as_dict(), "options": options}
    done = subprocess.run(
        [sys.executable, "-m", "globe.pipeline.batch"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=place.environment(),
    )
    seconds = time.perf_counter() - started
    if done.returncode == 0:
        told = json.loads(done.stdout.splitlines()[-1])
        return Outcome(job, told["status"], seconds, told["error"], told["metrics"])
    said = done.stderr.strip().splitlines() or ["nothing said"]
    return Outcome(job, "failed", seconds, f"the process ended with status {done.returncode}: {said[-1]}")


def _run(job: Entry, display: Display, **options: Any) -> Outcome:
    started = time.perf_counter()
    try:
        result = compress(job.model, job.out, job.settings, progress=display, **options)
    except Exception as error:
        told = str(error) if isinstance(error, GlobeError) else f"{type(error).__name__}: {error}"
        return Outcome(job, "failed", time.perf_counter() - started, " ".join(told.split()))
    resumed = any(stage["resumed"] for stage in result.metrics["stages"])
    status = "found" if result.found else "resumed" if resumed else "done"
    return Outcome(job, status, time.perf_counter() - started, None, result.metrics)


def _job(entry: Mapping[str, Any], defaults: Mapping[str, Any], home: Path) -> Entry:
    _known_keys(entry, ("model", "out", "settings", "config"), "the job")
    for key in ("model", "out"):
        if not isinstance(entry.get(key), str):
            raise UsageError(f"{key} is {entry.get(key)!r}; expected a directory")
    config, settings = entry.get("config"), entry.get("settings") or {}
    if not isinstance(settings, dict):
        raise UsageError(f"settings is {settings!r}; expected settings and their values")
    if not isinstance(config, str | None):
        raise UsageError(f"config is {config!r}; expected a YAML file")
    values = read_yaml(home / Path(config).expanduser(), "config") if config is not None else {}
    model, out = (home / Path(entry[key]).expanduser() for key in ("model", "out"))
    if not model.exists():
        fetched = local(entry["model"])
        model = model if fetched == Path(entry["model"]) else fetched
    return Entry(model, out, merge_settings(defaults, values, settings))


def _check(jobs: list[Entry]) -> None:
    """Refuse jobs that share an output, and those whose checkpoint or settings cannot work."""
    outs: dict[Path, int] = {}
    for number, job in enumerate(jobs, 1):
        where = f"job {number} ({job.out})"
        first = outs.setdefault(job.out.resolve(), number)
        if first != number:
            raise UsageError(f"{where}: job {first} has the same out; expected one for each job")
        if job.out.resolve() == job.model.resolve():
            raise UsageError(f"{where}: out is the model's own directory; name another")
        try:
            plan(job.model, job.settings)
        except GlobeError as error:
            raise UsageError(f"{where}: {error}") from None


def _reset_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    kernels.set_num_threads(None)


def _known_keys(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise UsageError(f"{where}: key {key!r} is unknown; expected {', '.join(known)}")


def _main() -> None:
    """Be the process of a job that was dealt to a place."""
    request = json.load(sys.stdin)
    job = Entry(Path(request["model"]), Path(request["out"]), Settings(**request["settings"]))
    outcome = _run(job, Silent(), **request["options"])
    print(json.dumps({"status": outcome.status, "error": outcome.error, "metrics": outcome.metrics}))


if __name__ == "__main__":
    _main()
