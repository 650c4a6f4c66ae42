"""Spherical k-means and farthest-first, which see a Gram alone, against loops over the vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sklearn.cluster
from test_seeds import normalised_proxies

from families import Array, make_family, make_rows, planted, seed_task
from globe.checkpoint.family import Family
from globe.seeds import farthest_first, hybrid_split, kmeans, ts_pca
from globe.seeds.proxies import Rows
from globe.settings import Settings

RANK, SIZE = 5, 6


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Array, Family, Rows]:
    weights = planted(request.param, experts=40, p=16, d=6, rank=3, atoms=4, uses=2, noise=0.4)
    family = make_family(tmp_path_factory.mktemp("centres"), weights.astype(np.float32).astype(np.float64))
    rows = make_rows(family, RANK, Settings())
    return normalised_proxies(weights, rows), family, rows


def lloyd(x: Array, size: int, steps: int, seed: int) -> Array:
    """Spherical k-means++ and Lloyd steps on the vectors themselves."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(x)))]
    while len(chosen) < size:
        distances = np.clip(1 - (x @ x[chosen].T).max(1), 0, None)
        distances[chosen] = 0
        steps_up = np.cumsum(distances)
        chosen.append(int(np.searchsorted(steps_up, rng.random() * steps_up[-1], side="right")))
    labels = (x @ x[chosen].T).argmax(1)
    for _ in range(steps + 1):
        centres = np.array([x[labels == k].sum(0) for k in range(size)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        labels, last = (x @ centres.T).argmax(1), labels
        if (labels == last).all():
            break
    return centres


@pytest.mark.parametrize("steps", [0, 1, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_kmeans_is_lloyds_loop(steps: int, seed: int, case: tuple[Array, Family, Rows]) -> None:
    x, family, rows = case
    seeds = kmeans(seed_task(family, rows, SIZE, lloyd_steps=steps, seed=seed))
    np.testing.assert_allclose(seeds.bank.flatten(1), lloyd(x, SIZE, steps, seed), atol=1e-5)


def test_kmeans_finds_the_clusters_that_scikit_learn_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(30) % 5
    weights = rng.standard_normal((5, 12, 8))[labels] + 0.05 * rng.standard_normal((30, 12, 8))
    family = make_family(tmp_path, weights)
    rows = make_rows(family, RANK, Settings())
    seeds = kmeans(seed_task(family, rows, 5))
    found = (normalised_proxies(weights, rows) @ seeds.bank.flatten(1).numpy().T).argmax(1)
    wanted = sklearn.cluster.KMeans(5, n_init=4, random_state=0).fit_predict(normalised_proxies(weights, rows))
    pairs = set(zip(found.tolist(), wanted.tolist(), strict=True))
    assert len(pairs) == 5
    np.testing.assert_allclose(seeds.codes.sum(1), 1, atol=0.1)


def test_a_cluster_for_every_expert_and_clusters_that_cancel(tmp_path: Path) -> None:
    weights = planted(4, experts=3, p=8, d=6, rank=2, atoms=3)
    family = make_family(tmp_path, np.concatenate([weights, -weights]))
    rows = make_rows(family, 2, Settings())
    for size in range(1, 7):
        for seed in range(5):
            seeds = kmeans(seed_task(family, rows, size, seed=seed))
            np.testing.assert_allclose(seeds.bank.flatten(1).norm(dim=1), 1, rtol=1e-6)
    assert seeds.proxy_error == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 6, 20])
def test_farthest_first_is_the_traversal(size: int, case: tuple[Array, Family, Rows]) -> None:
    x, family, rows = case
    chosen = [int((x @ x.sum(0)).argmax())]
    while len(chosen) < size:
        chosen.append(int((x @ x[chosen].T).max(1).argmin()))
    seeds = farthest_first(seed_task(family, rows, size))
    np.testing.assert_allclose(seeds.bank.flatten(1), x[chosen], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_hybrid_split_is_half_and_half(size: int, case: tuple[Array, Family, Rows]) -> None:
    _, family, rows = case
    half = size // 2
    for second, name in ((kmeans, "kmeans"), (farthest_first, "farthest-first")):
        found = hybrid_split(seed_task(family, rows, size, hybrid_centres=name)).bank
        first = ts_pca(seed_task(family, rows, size - half)).bank
        np.testing.assert_allclose(found[: size - half], first, atol=1e-5)
        if half:
            np.testing.assert_allclose(found[size - half :], second(seed_task(family, rows, half)).bank, atol=1e-5)
