"""Seeds of which half are principal directions and half are centres (specification, F)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from globe.seeds.farthest_first import farthest
from globe.seeds.gram_space import seeds_from_gram
from globe.seeds.kmeans import centres
from globe.seeds.sources import proxies_of
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import principal

Array = NDArray[np.float64]


def hybrid_split(task: SeedTask) -> Seeds:
    """The ⌈m/2⌉ leading principal directions, then ⌊m/2⌋ centres by k-means or farthest-first.

    Both from the same Gram; the proxies are read twice.
    """
    return seeds_from_gram(proxies_of(task), _split)


def _split(task: SeedTask, gram: Array) -> Array:
    second = task.size // 2
    first = principal(task, gram, task.size - second)
    if not second:
        return first
    pick = centres if task.settings.hybrid_centres == "kmeans" else farthest
    return np.vstack([first, pick(task, gram, second)])
