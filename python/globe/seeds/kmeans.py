"""Seeds by spherical k-means of the proxies (specification, D)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from globe.seeds.gram_space import floor, seeds_from_gram, too_few
from globe.seeds.sources import proxies_of
from globe.seeds.task import Seeds, SeedTask

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def kmeans(task: SeedTask) -> Seeds:
    """The m centres Σ_{i in cluster} x_i / ‖·‖ of the normalised proxies, clustered by their cosines.

    k-means++ and at most `lloyd_steps` Lloyd steps, all on one N × N Gram; the proxies are read twice.
    """
    return seeds_from_gram(proxies_of(task), lambda task, gram: centres(task, gram, task.size))


def centres(task: SeedTask, gram: Array, size: int) -> Array:
    """The weights (size, N) of spherical k-means' centres, 1/‖Σ x_i‖ for the members of a cluster.

    Raises
    ------
    GlobeError
        If the proxies point in fewer directions.
    """
    there = np.flatnonzero(np.diag(gram) > 0)
    inner = gram[np.ix_(there, there)]
    labels = _lloyd(inner, _plus_plus(task, inner, size), task.settings.lloyd_steps)
    weights = np.zeros((size, len(gram)))
    weights[labels, there] = 1.0
    energies = _energies(inner, weights[:, there])
    for cancelled in np.flatnonzero(np.isinf(energies)):  # its first member stands for it
        weights[cancelled] = np.arange(len(gram)) == there[labels == cancelled][0]
        energies[cancelled] = 1.0
    weights /= np.sqrt(energies)[:, None]
    return weights


def _plus_plus(task: SeedTask, gram: Array, size: int) -> Index:
    """k-means++ (Arthur & Vassilvitskii 2007): each centre is an expert, chosen ∝ its distance 1 − max cosine."""
    random = np.random.default_rng(task.settings.seed)
    chosen = [int(random.integers(len(gram)))]
    distances = 1 - gram[chosen[0]]
    while len(chosen) < size:
        distances[distances <= floor(gram)] = 0.0
        if not distances.any():
            raise too_few(task, len(chosen), "point in")
        steps = np.cumsum(distances)
        chosen.append(int(np.searchsorted(steps, random.random() * steps[-1], side="right")))
        distances = np.minimum(distances, 1 - gram[chosen[-1]])
    return np.array(chosen)


def _lloyd(gram: Array, chosen: Index, steps: int) -> Index:
    """The cluster of every expert, from centres at the `chosen` ones."""
    size = len(chosen)
    cosines = gram[:, chosen]
    labels = _filled(cosines.argmax(1), cosines)
    for _ in range(steps):
        members = np.zeros((size, len(gram)))
        members[labels, np.arange(len(gram))] = 1.0
        cosines = (gram @ members.T) / np.sqrt(_energies(gram, members))
        moved = _filled(cosines.argmax(1), cosines)
        if np.array_equal(moved, labels):
            break
        labels = moved
    return labels


def _filled(labels: Index, cosines: Array) -> Index:
    """Give an empty cluster the expert farthest from its own centre, out of a cluster that keeps another."""
    labels = labels.copy()
    counts = np.bincount(labels, minlength=cosines.shape[1])
    for empty in np.flatnonzero(counts == 0):
        own = np.where(counts[labels] > 1, cosines[np.arange(len(labels)), labels], np.inf)
        taken = int(own.argmin())
        counts[labels[taken]] -= 1
        counts[empty] = 1
        labels[taken] = empty
    return labels


def _energies(gram: Array, members: Array) -> Array:
    """‖Σ x_i‖² of every cluster, ∞ where opposite members cancel: no expert is near such a centre."""
    found = np.einsum("ki,ki->k", members @ gram, members)
    return np.where(found > floor(gram), found, np.inf)
