"""Seeds by PCA of proxies in a shared left subspace (specification, B)."""

from __future__ import annotations

from globe.seeds.gram_space import seeds_from_gram
from globe.seeds.sources import projected_proxies
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import principal


def left_gram(task: SeedTask) -> Seeds:
    """The m leading principal directions of the normalised proxies A_0ᵀ W_i.

    A_0 are the r leading eigenvectors of Σ_i W_i W_iᵀ. Two passes over the experts (the sum, and the proxies,
    which go to a scratch file), two over that file.
    """
    proxies, _ = projected_proxies(task)
    return seeds_from_gram(proxies, lambda task, gram: principal(task, gram, task.size))
