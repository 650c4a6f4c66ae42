"""Seeds by farthest-first traversal of the proxies (specification, D)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from globe.seeds.gram_space import floor, seeds_from_gram, too_few
from globe.seeds.sources import proxies_of
from globe.seeds.task import Seeds, SeedTask

Array = NDArray[np.float64]


def farthest_first(task: SeedTask) -> Seeds:
    """m of the normalised proxies, each the one whose largest cosine with those before it is smallest.

    Gonzalez (1985), the 2-approximation of k-centre. Two streamed passes over the proxies.
    """
    return seeds_from_gram(proxies_of(task), lambda task, gram: farthest(task, gram, task.size))


def farthest(task: SeedTask, gram: Array, size: int) -> Array:
    """The weights (size, N), one 1 a row. The first is the proxy of the largest summed cosine.

    Raises
    ------
    GlobeError
        If the proxies point in fewer directions.
    """
    there = np.diag(gram) > 0
    weights = np.zeros((size, len(gram)))
    nearest = np.where(there, -np.inf, np.inf)
    chosen = int(np.where(there, gram.sum(1), -np.inf).argmax())
    for atom in range(size):
        if 1 - nearest[chosen] <= floor(gram):
            raise too_few(task, atom, "point in")
        weights[atom, chosen] = 1.0
        nearest = np.maximum(nearest, gram[chosen])
        chosen = int(nearest.argmin())
    return weights
