"""Seeds by PCA whose least useful atoms give way to residual-greedy ones (specification, F)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from globe import kernels
from globe.seeds.gram_space import seeds_from_gram
from globe.seeds.residual_greedy import greedy
from globe.seeds.sources import proxies_of
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import principal

Array = NDArray[np.float64]


def hybrid_replace(task: SeedTask) -> Seeds:
    """The m leading principal directions; those that explain least give way to residual-greedy atoms.

    Principal directions are orthonormal, so the energy that atom j explains is Σ_i α_ij², α the NNLS codes. The
    `hybrid_share` of the atoms with the least are replaced. The proxies are read twice.
    """
    return seeds_from_gram(proxies_of(task), _replace)


def _replace(task: SeedTask, gram: Array) -> Array:
    weights = principal(task, gram, task.size)
    replaced = min(task.size, round(task.settings.hybrid_share * task.size))
    explained = (kernels.nnls(np.eye(task.size), gram @ weights.T).codes ** 2).sum(0)
    kept = np.sort(np.argsort(-explained, kind="stable")[: task.size - replaced])
    return greedy(task, gram, weights[kept], task.size)
