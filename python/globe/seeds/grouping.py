"""Experts in groups of like size, those with overlapping row spaces together."""

from __future__ import annotations

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def balanced_groups(similarity: Array, count: int, sweeps: int = 50) -> Labels:
    """Split n experts in `count` groups whose sizes differ by one at most: argmax Σ_g Σ_{i,j in g} K_ij.

    K is centred first, so the sum rewards what the experts of a group share beyond what all share. Two starts,
    contiguous runs (experts of a layer are often alike) and the experts nearest to farthest-first centres; each is
    improved by exchanging pairs of experts until no exchange raises the sum. Groups of one expert less hold a
    place that no expert takes, whose similarities are zero.

    Parameters
    ----------
    similarity : array, shape (n, n)
        K, such as the inner products ⟨W_iᵀW_i, W_jᵀW_j⟩ of normalised experts.
    count : int
        1 to n groups.
    sweeps : int
        At most this many rounds of exchanges.

    Returns
    -------
    array of int, shape (n,)
        Each expert's group.
    """
    experts = len(similarity)
    places = -(-experts // count)
    padded = np.zeros((count * places, count * places))
    padded[:experts, :experts] = similarity - similarity.mean(0) - similarity.mean(1)[:, None] + similarity.mean()
    absent = count * places - experts
    runs = np.concatenate([np.arange(experts) * count // experts, np.empty(absent, np.int64)])
    short = np.flatnonzero(np.bincount(runs[:experts], minlength=count) < places)
    runs[experts:] = short
    found = [_exchange(padded, start, experts, sweeps) for start in (runs, _nearest(padded, runs, experts, count))]
    return max(found, key=lambda labels: _within(padded, labels))[:experts]


def _within(similarity: Array, labels: Labels) -> float:
    return float(similarity[labels[:, None] == labels].sum())


def _nearest(similarity: Array, runs: Labels, experts: int, count: int) -> Labels:
    """Centres that are farthest from each other, and every expert at one of them, by the best assignment."""
    diagonal = np.diag(similarity)[:experts]
    distance = diagonal[:, None] + diagonal - 2 * similarity[:experts, :experts]
    centres = [int(diagonal.argmax())]
    nearest = distance[centres[0]].copy()
    while len(centres) < count:
        nearest[centres] = -np.inf
        centres.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distance[centres[-1]])
    groups, sizes = np.arange(count), np.bincount(runs[:experts], minlength=count)
    _, chosen = scipy.optimize.linear_sum_assignment(-similarity[:experts][:, np.repeat(centres, sizes)])
    labels: Labels = np.concatenate([np.repeat(groups, sizes)[chosen], runs[experts:]])
    return labels


def _exchange(similarity: Array, start: Labels, experts: int, sweeps: int) -> Labels:
    labels = start.copy()
    diagonal = np.diag(similarity)
    everyone = np.arange(len(labels))
    to_group = similarity @ (labels[:, None] == np.arange(labels.max() + 1))  # Σ_{j in g} K_ij
    smallest = 1e-12 * np.abs(diagonal).sum()
    for _ in range(sweeps):
        moved = False
        for i in range(experts):
            own = labels[i]
            gain = to_group[i, labels] - to_group[i, own] + to_group[:, own] - to_group[everyone, labels]
            gain += diagonal[i] + diagonal - 2 * similarity[i]
            gain[labels == own] = -np.inf
            if (labels[experts:] == own).any():  # one absent expert a group
                gain[experts:] = -np.inf
            j = int(gain.argmax())
            if gain[j] > smallest:
                difference = similarity[j] - similarity[i]
                to_group[:, own] += difference
                to_group[:, labels[j]] -= difference
                labels[i], labels[j] = labels[j], own
                moved = True
        if not moved:
            break
    return labels
