"""What metrics.json says of a family: the figures of the specification's section K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.artifact.write import Written
from globe.checkpoint.index import Family
from globe.compute.codes import supports
from globe.compute.gemm import bank_gram, correlations
from globe.fit.stored_lefts import Fit
from globe.fit.training import Training
from globe.runs.stages import Advance
from globe.seeds import Seeds
from globe.seeds.proxies import Rows, proxy_blocks
from globe.sizes.ratios import Shape

Array = NDArray[np.float64]

COHERENT = 0.95  # |cosine| from which two atoms are told as the same
_MOST_PAIRS = 16


def seeds_report(seeds: Seeds) -> dict[str, Any]:
    """Supports, popularity of atoms, norms and coherence of the seeds."""
    return _bank_report(seeds.bank, seeds.codes)


def training_report(shape: Shape, rows: Rows, notes: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """Seeds and loops: explained variance, errors at the start, what `seeds_report` found, and every loop.

    Parameters
    ----------
    shape, rows, training
    notes : mapping
        "seeds", all fields of the seeds but bank and codes, their report and the "choice" of the method; and "stage",
        the record of the stage that made them.
    """
    seeds, stage = notes["seeds"], notes["stage"]
    return {
        "rank": shape.rank,
        "bank": shape.bank,
        "validation_rows": len(rows.validation),
        "explained_variance": seeds["explained_variance"],
        "init": {
            "relative_error": training.initial.relative_error if training.initial is not None else None,
            **{key: value for key, value in seeds.items() if key != "choice"},
            "seconds": stage["seconds"],
            "peak_rss_bytes": stage["peak_rss_bytes"],
        },
        "seeds": seeds["choice"],
        "temperature": training.state.temperature,
        "stopped": training.stopped,
        "history": [record.as_dict() for record in training.history],
    }


def stored_report(name: str, fit: Fit, written: Written) -> dict[str, Any]:
    """What is measured on the factors as stored."""
    errors, energies = written.errors[name], written.energies[name]
    return {
        "relative_error": float(errors.sum() / energies.sum()),
        "expert_errors": _quotients(errors, energies),
        **_weighted_report([written.weighted[name]] if fit.metric is not None else []),
        "ridged_left_factors": written.ridged[name],
        **_bank_report(fit.state.bank, fit.state.codes),
    }


def families_report(
    names: Sequence[str], reports: dict[str, dict[str, Any]], fits: Mapping[str, Fit], written: Written
) -> dict[str, Any]:
    """`families`: the reports; where the pools are not the families, a summary of each, and the reports in `pools`."""
    if set(reports) == set(names):
        return {"families": reports}
    return {"families": {name: _family_report(name, reports, fits, written) for name in names}, "pools": reports}


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


def _bank_report(bank: torch.Tensor, codes: Array) -> dict[str, Any]:
    gram = bank_gram(bank)
    norms = np.sqrt(np.diag(gram))
    unit = gram / np.outer(norms, norms)
    off = unit - np.diag(np.diag(unit))
    sizes = supports(codes)
    first, second = np.nonzero(np.triu(np.abs(off) >= COHERENT))
    closest = np.argsort(-np.abs(off[first, second]), kind="stable")[:_MOST_PAIRS]
    return {
        "support_median": float(np.median(sizes)),
        "support_histogram": np.bincount(sizes, minlength=len(gram) + 1).tolist(),
        "atom_popularity": np.count_nonzero(codes, axis=0).tolist(),
        "coherence": float(np.linalg.norm(unit - np.eye(len(gram)))),
        "coherence_max": float(np.abs(off).max()),
        "coherent_pairs": [[int(first[k]), int(second[k]), float(off[first[k], second[k]])] for k in closest],
        "atom_norm_max_deviation": float(np.abs(norms - 1).max()),
    }


def proxy_error(family: Family, rows: Rows, bank: torch.Tensor, block_bytes: int, advance: Advance) -> float:
    """Relative error of the NNLS codes of the normalised proxies on a bank; 0 where all proxies are."""
    products, energy = np.zeros((len(family), len(bank))), np.zeros(len(family))
    for span, block in proxy_blocks(family, rows.proxy, bank.device, block_bytes):
        block = block.float()
        products += correlations(block, bank[:, span].contiguous())
        advance((span.stop - span.start) / len(rows.proxy))
        energy += block.pow(2).sum(1).cpu().double().numpy()
    products /= np.sqrt(np.where(energy > 0, energy, 1.0))[:, None]
    gram = bank_gram(bank)
    codes = kernels.nnls(gram, products).codes
    errors = 1 - 2 * (codes * products).sum(1) + np.einsum("ij,jk,ik->i", codes, gram, codes)
    there = energy > 0
    return float(errors[there].mean()) if there.any() else 0.0
