"""What is said of a pool's seeds, loops and bank (specification, K)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.compute import ranks
from globe.compute.codes import supports
from globe.compute.gemm import bank_gram, correlations
from globe.fit.training import Training
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.seeds.proxies import proxy_blocks, row_spans

Array = NDArray[np.float64]

COHERENT = 0.95  # |cosine| from which two atoms are told as the same
_MOST_PAIRS = 16


def training_report(pool: Pool, notes: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """Seeds and loops: explained variance, errors at the start, what `bank_report` found, and every loop.

    Parameters
    ----------
    pool, training
    notes : mapping
        "seeds", all fields of the seeds but bank and codes, their report and the "choice" of the method; and "stage",
        the record of the stage that made them.
    """
    seeds, stage = notes["seeds"], notes["stage"]
    return {
        "rank": pool.shape.rank,
        "bank": pool.shape.bank,
        "validation_rows": len(pool.rows.validation),
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


def bank_report(bank: torch.Tensor, codes: Array) -> dict[str, Any]:
    """Supports, popularity of atoms, norms and coherence."""
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


def proxy_error(pool: Pool, bank: torch.Tensor, block_bytes: int, advance: Advance) -> float:
    """Relative error of the NNLS codes of the normalised proxies on a bank; 0 where all proxies are."""
    family, rows = pool.family, pool.rows
    products, energy = np.zeros((len(family), len(bank))), np.zeros(len(family))
    spans = row_spans(len(family), len(rows.proxy), family.d, block_bytes)
    for span, block in proxy_blocks(family, rows.proxy, bank.device, ranks.share(spans)):
        block = block.float()
        products += correlations(block, bank[:, span].contiguous())
        advance((span.stop - span.start) / len(rows.proxy))
        energy += block.pow(2).sum(1).cpu().double().numpy()
    products, energy = ranks.summed_array(products), ranks.summed_array(energy)
    products /= np.sqrt(np.where(energy > 0, energy, 1.0))[:, None]
    gram = bank_gram(bank)
    codes = kernels.nnls(gram, products).codes
    errors = 1 - 2 * (codes * products).sum(1) + np.einsum("ij,jk,ik->i", codes, gram, codes)
    there = energy > 0
    return float(errors[there].mean()) if there.any() else 0.0
