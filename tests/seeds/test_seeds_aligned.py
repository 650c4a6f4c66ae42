"""PCA of aligned proxies: the polar factor and the seeds against SciPy, and what row order changes (nothing)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from families import Array, make_family, make_rows, planted, seed_task
from globe.seeds import aligned_pca, ts_pca
from globe.seeds.aligned_pca import polar
from globe.settings import Settings

RANK, SIZE = 6, 4


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (6, 40), (60, 60)])
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_polar_factor_is_scipys(rows: int, columns: int, condition: float) -> None:
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    matrix = 7.0 * (left * np.geomspace(1, 1 / condition, rows)) @ right
    found = polar(torch.from_numpy(matrix).float()).numpy()
    np.testing.assert_allclose(found, scipy.linalg.polar(matrix, side="left")[0], atol=2e-4)


def test_polar_factor_of_little_or_nothing() -> None:
    assert not polar(torch.zeros(3, 5)).any()
    matrix = torch.zeros(3, 5)
    matrix[0, 0], matrix[1, 1] = 2.0, 1e-6  # a direction lost in rounding stays small
    found = polar(matrix)
    assert found[0, 0] == pytest.approx(1, abs=1e-5)
    assert 0 <= found[1, 1] < 0.1 and not found[2].any()
    for scale in (1e-12, 1e12):
        some = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
        np.testing.assert_allclose(polar(scale * some), polar(some), atol=1e-5)


def oracle(weights: Array, rounds: int) -> Array:
    """The atoms, by eigenvectors, SVDs and vectors in fp64."""
    reference = np.linalg.eigh(np.einsum("ipd,ipe->de", weights, weights))[1][:, : -RANK - 1 : -1].T
    for _ in range(rounds):
        proxies = np.array([scipy.linalg.polar(reference @ w.T, side="left")[0] @ w for w in weights])
        flat = proxies.reshape(len(weights), -1)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        reference = flat.mean(0).reshape(RANK, -1)
    right: Array = np.linalg.svd(flat, full_matrices=False)[2][:SIZE]
    return right


@pytest.mark.parametrize("rounds", [1, 2])
def test_atoms_are_those_of_the_oracle(rounds: int, tmp_path: Path) -> None:
    weights = planted(1, experts=20, p=14, d=12, rank=RANK, atoms=5, noise=0.1)
    family = make_family(tmp_path, weights)
    rows = make_rows(family, RANK, Settings())
    task = seed_task(family, rows, SIZE, scratch=tmp_path, procrustes_rounds=rounds)
    found = aligned_pca(task).bank.double().numpy()
    wanted = oracle(weights[:, rows.train], rounds).reshape(SIZE, RANK, -1)
    # a row of the reference has an open sign, and with it that row of every atom
    np.testing.assert_allclose(np.abs(np.einsum("jrd,jrd->jr", found, wanted)).sum(1), 1, atol=2e-3)


def test_the_order_of_neurons_does_not_matter(tmp_path: Path) -> None:
    weights = planted(2, experts=16, p=14, d=12, rank=RANK, atoms=5, noise=0.1)
    rng = np.random.default_rng(3)
    turned = np.array([scipy.stats.ortho_group.rvs(14, random_state=rng) @ rng.permutation(w) for w in weights])
    found = []
    for name, experts in (("plain", weights), ("turned", turned)):
        family = make_family(tmp_path / name, experts)
        rows = make_rows(family, RANK, Settings(selector="uniform", validation_share=0.0))
        task = seed_task(family, rows, SIZE, scratch=tmp_path / name, procrustes_rounds=2)
        found.append((aligned_pca(task), ts_pca(task)))
    (plain, plain_rows), (permuted, permuted_rows) = found
    per_row = torch.einsum("jrd,jrd->jr", plain.bank, permuted.bank).abs().sum(1)
    np.testing.assert_allclose(per_row, 1, atol=1e-3)
    assert permuted.explained_variance == pytest.approx(plain.explained_variance, rel=1e-3)
    assert permuted_rows.explained_variance < 0.8 * plain.explained_variance
    assert plain_rows.explained_variance < plain.explained_variance
