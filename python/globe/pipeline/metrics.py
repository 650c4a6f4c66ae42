"""What metrics.json says of a family: the figures of the specification's section K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globe.artifact.write import Written
from globe.compute.codes import supports
from globe.fit.describe import bank_report
from globe.fit.stored_lefts import Fit

Array = NDArray[np.float64]


def stored_report(name: str, fit: Fit, written: Written) -> dict[str, Any]:
    """What is measured on the factors as stored."""
    errors, energies = written.errors[name], written.energies[name]
    return {
        "relative_error": float(errors.sum() / energies.sum()),
        "expert_errors": _quotients(errors, energies),
        **_weighted_report([written.weighted[name]] if fit.metric is not None else []),
        "ridged_left_factors": written.ridged[name],
        **bank_report(fit.state.bank, fit.state.codes),
    }


def families_report(
    names: Sequence[str], reports: dict[str, dict[str, Any]], fits: Mapping[str, Fit], written: Written
) -> dict[str, Any]:
    """`families`: the reports; where the pools are not the families, a summary of each, and the reports in `pools`."""
    if set(reports) == set(names):
        return {"families": reports}
    there = [name for name in names if any(name in fit.family.families for fit in fits.values())]
    return {"families": {name: _family_report(name, reports, fits, written) for name in there}, "pools": reports}


def _family_report(
    name: str, reports: Mapping[str, dict[str, Any]], fits: Mapping[str, Fit], written: Written
) -> dict[str, Any]:
    """A family's experts over all pools that hold some; errors at the start are those of its pools."""
    held = {pool: fit for pool, fit in fits.items() if name in fit.family.families}
    errors, energies, seeds, sizes, weighted = [], [], [], [], []
    for pool, fit in held.items():
        numbers = [number for number, expert in enumerate(fit.family.experts) if expert.family == name]
        errors.append(written.errors[pool][numbers])
        energies.append(written.energies[pool][numbers])
        sizes.append(supports(fit.state.codes[numbers]))
        seen = energies[-1]  # what the pool's errors at the start are shares of
        if fit.metric is not None:
            weighted.append(written.weighted[pool][numbers])
            seen = weighted[-1][:, 1]
        seeds.append((reports[pool]["init"]["relative_error"] * seen.sum(), seen.sum()))
    error, energy = np.concatenate(errors), np.concatenate(energies)
    lost, whole = np.sum(seeds, axis=0)
    return {
        "pools": list(held),
        "rank": next(reports[pool]["rank"] for pool in held),
        "bank": sum(reports[pool]["bank"] for pool in held),
        "init": {"relative_error": float(lost / whole)},
        "relative_error": float(error.sum() / energy.sum()),
        "expert_errors": _quotients(error, energy),
        **_weighted_report(weighted),
        "support_median": float(np.median(np.concatenate(sizes))),
    }


def _weighted_report(parts: Sequence[Array]) -> dict[str, Any]:
    """Errors as the metric sees them, of experts whose errors and energies (n, 2) are `parts`: of all, and of each."""
    if not parts:
        return {"weighted_error": None, "expert_weighted_errors": None}
    lost, whole = np.concatenate(parts).T
    return {"weighted_error": float(lost.sum() / whole.sum()), "expert_weighted_errors": _quotients(lost, whole)}


def _quotients(errors: Array, energies: Array) -> list[float]:
    quotients: list[float] = (errors / np.where(energies > 0, energies, 1.0)).tolist()
    return quotients
