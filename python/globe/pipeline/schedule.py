"""How a run keeps to its time limit: refused where it cannot, and dealt to the fits of the pools."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from globe.choice.estimate import Estimate, estimate, measured_rates
from globe.choice.plan import Plan
from globe.correction.down import CORRECTED
from globe.errors import UsageError
from globe.runs.job import Job
from globe.runs.stages import Stage, Stages
from globe.runs.turn import Turn
from globe.settings import Settings, seconds_text

_CLOSING = 2.0  # seconds: metrics.json, the files beside the weights, the report
_RESERVED = 1.15  # of what the stages after the fits are expected to take
_SLOWEST, _FASTEST = 8.0, 0.5
_FITS = ("joint", "loops")


@dataclass(frozen=True)
class Schedule:
    """A run's time, and what its stages are expected to take."""

    turn: Turn
    estimate: Estimate

    def refuse(self, settings: Settings, done: set[str]) -> None:
        """Refuse a limit below what one pass of every fit, and what cannot be cut, are expected to take.

        Parameters
        ----------
        settings : Settings
        done : set of str
            Stages that an earlier process did.

        Raises
        ------
        UsageError
            Says what would do.
        """
        least, left = self.estimate.least(done) + _CLOSING, self.turn.left
        if least <= left:
            return
        remedies = [f"--time-limit {math.ceil(1.3 * least + self._spent(settings))}s or more"]
        measuring, correcting = (
            self._least_of({"sample", "calibrate", "fisher"}, done),
            self._least_of({"correct"}, done),
        )
        if correcting > 0 and least - correcting < left:
            remedies.append(f"--correct none ({seconds_text(least - correcting)})")
        without = least - measuring - correcting
        if measuring > 0 and without < left:
            also = " --correct none" if correcting > 0 else ""
            remedies.append(f"--calibrate none{also} ({seconds_text(without)})")
        calibrated = "calibration, " if self.estimate.of("calibrate").seconds else ""
        corrected = "corrections " if correcting > 0 else ""
        raise UsageError(
            f"time_limit is {seconds_text(settings.time_limit or 0.0)}; reading, {calibrated}seeds, one pass of every "
            f"fit{', ' if corrected else ' '}{corrected}and writing are estimated to take {seconds_text(least)} here; "
            f"use {' or '.join(remedies)}"
        )

    def _least_of(self, names: set[str], done: set[str]) -> float:
        return sum(self.estimate.of(name).least for name in names - done)

    def _spent(self, settings: Settings) -> float:
        return max(0.0, (settings.time_limit or 0.0) - self.turn.left)

    def turn_of(self, name: str, job: Job) -> Turn:
        """The turn of a pool's fit: its share, by cost, of the time that is left but for what comes after the fits."""
        done = set(job.store.names())
        places = [stage.name.partition(": ") for stage in self.estimate.stages]
        fits = {pool: self.estimate.of(f"{pool}: {kind}").seconds for pool, _, kind in places if kind in _FITS}
        waiting = {pool: seconds for pool, seconds in fits.items() if pool == name or f"{pool}.fit" not in done}
        over = {record.name for record in job.stages.records}
        after = sum(
            stage.seconds
            for stage in self.estimate.stages
            if stage.name not in over and stage.name.partition(": ")[2] not in _FITS
        )
        reserved = _RESERVED * _slowness(self.estimate, job.stages.records) * (after + _CLOSING)
        share = waiting.get(name, 0.0) / max(sum(waiting.values()), 1e-9)
        return self.turn.within((self.turn.left - reserved) * share)


def schedule(turn: Turn | None, planned: Plan, settings: Settings) -> Schedule | None:
    """The schedule of a run, from a probe of the machine; None without a time limit."""
    return None if turn is None else Schedule(turn, estimate(planned, settings, measured_rates(planned, settings)))


def measured(before: Schedule | None, planned: Plan, settings: Settings, stages: Stages) -> Schedule | None:
    """The schedule with the sizes that were planned, and the rate at which the scans have read."""
    if before is None:
        return None
    scans = [each for each in stages.records if each.name.endswith(": scan") and not each.resumed]
    seconds, read = sum(each.seconds for each in scans), sum(each.bytes_read for each in scans)
    rates = before.estimate.rates
    rates = replace(rates, reading=read / seconds) if seconds > 0 and read > 0 else rates
    return replace(before, estimate=estimate(planned, settings, rates))


def done_stages(folder: Path, layers: int) -> set[str]:
    """The stages whose results lie in a run's folder; corrections are done with those of so many layers."""
    results = [path.stem for path in folder.glob("*.json")]
    corrected = sum(name.startswith(CORRECTED) for name in results) == layers
    return {*_stages_of(results), *(["correct"] if corrected else [])}


def _stages_of(results: Iterable[str]) -> Iterable[str]:
    for result in results:
        pool, _, kind = result.rpartition(".")
        if result == "plan":
            yield "plan"
        elif result == "calibration":
            yield from ("sample", "calibrate", "fisher")
        elif kind in ("scan", "proxies"):
            yield f"{pool}: {kind}"
        elif kind == "rounded":
            yield f"{pool}: round"
        elif kind in ("fit", "warm") or re.fullmatch(r"(joint|loop)-\d+", kind):
            yield f"{pool}: seeds"
            if kind == "fit":
                yield from (f"{pool}: {each}" for each in _FITS)


def _slowness(expected: Estimate, records: Iterable[Stage]) -> float:
    """What stages took over what they were expected to, those that a limit cuts apart."""
    took = known = 1.0
    for record in records:
        before = expected.of(record.name).seconds
        if before > 0 and not record.resumed and record.name.partition(": ")[2] not in _FITS:
            took, known = took + record.seconds, known + before
    return min(max(took / known, _FASTEST), _SLOWEST)
