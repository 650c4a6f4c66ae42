"""Left-Gram PCA and randomised PCA against NumPy's eigenvectors and SVD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from families import Array, make_family, make_rows, planted, seed_task
from globe.checkpoint.family import Family
from globe.seeds import left_gram, rpca
from globe.seeds.proxies import Rows
from globe.seeds.rpca import orthonormalise
from globe.settings import Settings

RANK, SIZE = 6, 5
TRAIN = np.delete(np.arange(20), 10)  # one row in 32, and at least one, is held out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Array, Family, Rows]:
    """Experts whose normalised projections have a spectrum that falls."""
    rng = np.random.default_rng(0)
    codes = np.abs(rng.standard_normal((24, 10))) * 0.6 ** np.arange(10)
    left = rng.standard_normal((20, 16))
    weights = np.einsum("pr,ij,jrd->ipd", left, codes, rng.standard_normal((10, 16, 18)))
    weights *= np.geomspace(0.1, 10, 24)[:, None, None]
    family = make_family(tmp_path_factory.mktemp("projected"), weights.astype(np.float32).astype(np.float64))
    rows = make_rows(family, RANK, Settings())
    np.testing.assert_array_equal(rows.train, TRAIN)
    return weights, family, rows


def projections(weights: Array) -> Array:
    """x_i = vec(A_0ᵀ W_i)/‖·‖ of the training rows, as rows, in fp64."""
    weights = weights[:, TRAIN]
    leading = np.linalg.eigh(np.einsum("ipd,iqd->pq", weights, weights))[1][:, : -RANK - 1 : -1]
    flat = np.einsum("pr,ipd->ird", leading, weights).reshape(len(weights), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def overlaps(weights: Array, bank: torch.Tensor) -> Array:
    """|⟨atom, singular vector⟩|; the eigenvectors' signs are open, and so are those of the rows of a proxy."""
    x = projections(weights).reshape(len(weights), RANK, -1)
    right = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)[2][:SIZE].reshape(SIZE, RANK, -1)
    per_row = np.einsum("jrd,jrd->jr", right, bank.double().numpy())
    return np.abs(per_row).sum(1)


def test_left_gram_finds_the_leading_singular_vectors(case: tuple[Array, Family, Rows], tmp_path: Path) -> None:
    weights, family, rows = case
    seeds = left_gram(seed_task(family, rows, SIZE, scratch=tmp_path))
    np.testing.assert_allclose(overlaps(weights, seeds.bank), 1, rtol=1e-4)
    energies = np.linalg.svd(projections(weights), compute_uv=False) ** 2
    assert seeds.explained_variance == pytest.approx(energies[:SIZE].sum() / energies.sum(), rel=1e-5)


@pytest.mark.parametrize(("iterations", "tolerance"), [(4, 1e-3), (2, 2e-2)])
def test_rpca_finds_them_too(
    iterations: int, tolerance: float, case: tuple[Array, Family, Rows], tmp_path: Path
) -> None:
    weights, family, rows = case
    task = seed_task(family, rows, SIZE, scratch=tmp_path, oversampling=2, power_iterations=iterations)
    seeds = rpca(task)
    np.testing.assert_allclose(overlaps(weights, seeds.bank), 1, atol=tolerance)
    exact = left_gram(task)
    assert exact.explained_variance * (1 - tolerance) <= seeds.explained_variance <= exact.explained_variance + 1e-6
    coefficients = projections(weights) @ seeds.bank.flatten(1).double().numpy().T
    assert coefficients.shape == (24, SIZE)


def test_power_iterations_and_oversampling_help(case: tuple[Array, Family, Rows], tmp_path: Path) -> None:
    _, family, rows = case
    variance = {
        (q, power): np.mean(
            [
                rpca(
                    seed_task(family, rows, SIZE, scratch=tmp_path, oversampling=q, power_iterations=power, seed=seed)
                ).explained_variance
                for seed in range(4)
            ]
        )
        for q, power in [(0, 0), (3, 0), (0, 1), (3, 1)]
    }
    assert variance[0, 0] < min(variance[3, 0], variance[0, 1])
    assert max(variance[3, 0], variance[0, 1]) < variance[3, 1]


def test_experts_within_the_bank_size_leave_no_room_for_oversampling(tmp_path: Path) -> None:
    weights = planted(1, experts=6, p=12, d=10, rank=4, atoms=6, noise=0.5)
    family = make_family(tmp_path, weights)
    seeds = rpca(seed_task(family, make_rows(family, 4, Settings()), 6, scratch=tmp_path))
    assert seeds.explained_variance == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("condition", [1.0, 1e2])
def test_orthonormalised_in_fp32(condition: float) -> None:
    rng = np.random.default_rng(2)
    left, _, right = np.linalg.svd(rng.standard_normal((8, 20_000)), full_matrices=False)
    bank = torch.from_numpy((left * np.geomspace(1, 1 / condition, 8)) @ right).float().view(8, 100, 200)
    basis = orthonormalise(bank.clone(), 30).double().flatten(1).numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=2e-6)
    np.testing.assert_allclose(np.linalg.svd(basis @ right.T, compute_uv=False), 1, rtol=1e-5)


def test_dependent_directions_are_dropped() -> None:
    bank = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))
    bank = torch.cat([bank, bank[1:3] + bank[:2], 1e-6 * torch.randn(1, 5, 6)])
    assert len(orthonormalise(bank, 7)) == 4
