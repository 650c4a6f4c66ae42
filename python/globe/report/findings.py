"""What deserves a reader's attention in a finished output, in plain words with its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from globe.evaluation.record import warning
from globe.fit.codes import TEMPERATURE_BOUNDS
from globe.fit.describe import COHERENT
from globe.report.data import Array, FamilyView, PoolView, Run
from globe.report.svg import number, percent

_STEERED = ("entmax", "sparsemax")
_NAMED = 5
_FALLING = 0.02


@dataclass(frozen=True)
class Finding:
    """A warning is something to look at or to mend; what is no warning is worth knowing."""

    text: str
    warning: bool = True


def findings(run: Run) -> list[Finding]:
    """Warnings first, then notes."""
    found = [one for pool in run.pools for one in _of_pool(pool, run)]
    found += [one for family in run.families for one in _of_family(family)]
    narrow = warning(run.judged)
    found += [Finding(narrow)] if narrow is not None else []
    calibration = run.metrics.get("calibration")
    if calibration is None:
        found.append(
            Finding(
                "No activation statistics were used: the errors weigh every input alike, and say little of how well "
                "the model still predicts. globe eval measures that; --calibrate auto lets the fit know.",
                warning=False,
            )
        )
    else:
        found += [Finding(f"Calibration: {one}") for one in calibration.get("warnings", [])]
    return sorted(found, key=lambda one: not one.warning)


def _of_pool(pool: PoolView, run: Run) -> Iterator[Finding]:
    report, settings, bank = pool.report, run.settings, f"Bank {pool.name}"
    dead = np.flatnonzero(pool.users.sum(1) == 0)
    if len(dead):
        yield Finding(
            f"{bank}: {_count(len(dead), 'atom')} of {pool.atoms} {_are(len(dead))} dead, used by no expert "
            f"({_list(dead.tolist())}), and stored for nothing. A smaller bank (--bank-size) would do as well."
        )
    pairs, highest = report.get("coherent_pairs"), report.get("coherence_max", 0.0)
    if pairs or (pairs is None and highest >= COHERENT):
        told = _list([f"{one} and {other} at {value:.3f}" for one, other, value in pairs or []])
        yield Finding(
            f"{bank}: atoms are duplicated, with a coherence (cosine) of up to {highest:.3f}"
            f"{f': {told}' if told else ''}. One atom of such a pair could be spared."
        )
    yield from _steering(pool, run)
    if report.get("ridged_left_factors"):
        yield Finding(
            f"{bank}: {_count(report['ridged_left_factors'], 'left factor')} of {int(pool.held.sum())} "
            f"{_are(report['ridged_left_factors'])} ill-conditioned and took a ridge (setting ridge = "
            f"{number(settings.get('ridge', float('nan')))}): the atoms that these experts mix are nearly dependent."
        )
    irregular = report["history"][-1].get("irregular_codes", 0) if report.get("history") else 0
    if irregular:
        yield Finding(
            f"{bank}: {_count(irregular, 'coding problem')} in the last loop were singular or did not converge."
        )
    yield from _unfinished(pool)


def _steering(pool: PoolView, run: Run) -> Iterator[Finding]:
    """The temperature at its bound, and supports off their target."""
    report, settings = pool.report, run.settings
    if settings.get("codes") not in _STEERED:
        return
    joint = report.get("joint") or {}
    course = [record["temperature"] for record in [*report.get("history", []), *joint.get("history", [])]]
    low, high = TEMPERATURE_BOUNDS
    for bound, side, remedy in ((low, "lower", "larger"), (high, "upper", "smaller")):
        last = course[-1] if course else None
        if last is not None and abs(last / bound - 1) < 1e-3:
            yield Finding(
                f"Bank {pool.name}: the temperature ended at its {side} bound, {number(bound)}, so it could no longer "
                f"steer the supports towards {settings['support']}. A {remedy} --support is within reach."
            )
    target, median = settings["support"], report["support_median"]
    if median > 1.25 * target:
        yield Finding(
            f"Bank {pool.name}: the median support is {number(median)}, above the target of {target}; the codes "
            "take more room and time than asked for."
        )


def _unfinished(pool: PoolView) -> Iterator[Finding]:
    """An error that ended above that of the seeds, or that was still falling when its steps were up."""
    report = pool.report
    seeds, final = report["init"]["relative_error"], report["relative_error"]
    if report.get("weighted_error") is None and final > 1.001 * seeds:
        yield Finding(
            f"Bank {pool.name}: the relative error is {number(final)}, above the {number(seeds)} of the seeds: "
            "training made it worse."
        )
    joint = report.get("joint") or {}
    if joint:
        course = [(record["step"], record["error"]) for record in joint["history"]]
        what, stopped = "step", joint.get("stopped")
    else:
        course = [(record["loop"], record["relative_error"]) for record in report.get("history", [])]
        what, stopped = "loop", report.get("stopped")
    options = {"joint_steps": "more --joint-steps", "outer_loops": "more --outer-loops"}
    option = {**options, "time_limit": "a longer --time-limit"}.get(stopped or "")
    if option is None:
        return
    if len(course) > 1:
        (before, high), (last, low) = course[-2:]
        if 1 - low / high >= _FALLING:
            yield Finding(
                f"Bank {pool.name}: the error still fell by {percent(1 - low / high)} in the last "
                f"{_count(last - before, what)}; {option} would lower it further.",
                warning=False,
            )


def _of_family(family: FamilyView) -> Iterator[Finding]:
    kinds = [("a relative error", family.errors)]
    if family.weighted is not None:
        kinds.append(("an activation-weighted error", family.weighted))
    for what, errors in kinds:
        found = outliers(errors)
        if len(found):
            median = float(np.median(errors))
            shown = _list(
                [
                    f"layer {family.layers[k]} expert {family.numbers[k]}: {number(errors[k], 3)}, "
                    f"{number(errors[k] / median, 2)} times"
                    for k in found
                ]
            )
            yield Finding(
                f"Family {family.name}: {_count(len(found), 'expert')} of {len(errors)} "
                f"{'has' if len(found) == 1 else 'have'} {what} far above the rest, whose median is "
                f"{number(median, 3)} ({shown})."
            )


def outliers(errors: Array) -> list[int]:
    """Experts whose error is above Q3 + 3 (Q3 − Q1) and half as large again as the median, the largest first."""
    first, median, third = np.quantile(errors, (0.25, 0.5, 0.75))
    above = np.flatnonzero((errors > third + 3 * (third - first)) & (errors > 1.5 * median) & (median > 0))
    ordered: list[int] = above[np.argsort(-errors[above], kind="stable")].tolist()
    return ordered


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _list(items: list[object] | list[int] | list[str]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(map(str, items[:_NAMED])) + more
