"""Seeds by tall-skinny PCA of the proxies (specification, A.3 to A.5)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from globe.seeds.gram_space import floor, seeds_from_gram, signs, too_few
from globe.seeds.sources import row_proxies
from globe.seeds.task import Seeds, SeedTask

Array = NDArray[np.float64]


def ts_pca(task: SeedTask) -> Seeds:
    """The m leading principal directions of the normalised row-sampled proxies x_i = vec(S W_i)/‖S W_i‖.

    Two streamed passes over the rows of the proxies; see `principal`.
    """
    return seeds_from_gram(row_proxies(task), lambda task, gram: principal(task, gram, task.size))


def principal(task: SeedTask, gram: Array, size: int) -> Array:
    """The weights (size, N) of the leading principal directions: C = V Λ Vᵀ, atom j is X v_j λ_j^(-1/2).

    Its sign is such that the positive part of its coefficients carries the most energy.

    Raises
    ------
    GlobeError
        If the proxies span fewer directions.
    """
    values, vectors = scipy.linalg.eigh(gram)
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    spanned = int((values > floor(gram) * values[0]).sum())
    if spanned < size:
        raise too_few(task, spanned, "span")
    weights: Array = (vectors * signs(vectors) / np.sqrt(values)).T
    return weights
