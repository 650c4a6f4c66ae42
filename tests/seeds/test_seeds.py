"""Tall-skinny PCA against NumPy's SVD of the normalised proxies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

from families import Array, make_family, make_pool, make_rows, planted, seed_task, silent
from globe.checkpoint.family import Family
from globe.errors import GlobeError
from globe.fit.describe import proxy_error
from globe.seeds import Seeds, ts_pca
from globe.seeds.proxies import Rows
from globe.settings import Settings

RANK, SIZE = 8, 6


def normalised_proxies(weights: Array, rows: Rows) -> Array:
    """x_i = vec(S W_i)/‖S W_i‖ as rows, in fp64."""
    flat = weights[:, rows.proxy].reshape(len(weights), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=["energy", "uniform", "random"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Array, Family, Rows, Seeds]:
    scales = np.geomspace(0.01, 100, 20)[:, None, None]  # norms that matter if they are not divided out
    weights = scales * (planted(3, experts=20, p=40, d=24, rank=8, atoms=9) + 3.0)
    family = make_family(tmp_path_factory.mktemp("seeds"), weights.astype(np.float32).astype(np.float64))
    rows = make_rows(family, RANK, Settings(selector=request.param))
    return weights, family, rows, ts_pca(seed_task(family, rows, SIZE))


def test_atoms_are_the_leading_singular_vectors(case: tuple[Array, Family, Rows, Seeds]) -> None:
    weights, _, rows, seeds = case
    x = normalised_proxies(weights, rows)
    right = np.linalg.svd(x, full_matrices=False)[2][:SIZE]
    atoms = seeds.bank.numpy().reshape(SIZE, -1).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.abs((atoms * right).sum(1)), 1, rtol=1e-5)
    wanted = np.array([scipy.optimize.nnls(atoms.T, row)[0] for row in x])
    np.testing.assert_allclose(seeds.codes, wanted, atol=1e-5)


def test_the_positive_part_carries_most_energy(case: tuple[Array, Family, Rows, Seeds]) -> None:
    weights, _, rows, seeds = case
    atoms = seeds.bank.numpy().reshape(SIZE, -1).astype(np.float64)
    coefficients = normalised_proxies(weights, rows) @ atoms.T
    positive, negative = ((np.maximum(sign * coefficients, 0) ** 2).sum(0) for sign in (1, -1))
    assert (positive > negative).all()
    assert positive[0] > 100 * negative[0]  # the common direction: every expert has it with the same sign


def test_explained_variance(case: tuple[Array, Family, Rows, Seeds]) -> None:
    weights, _, rows, seeds = case
    energies = np.linalg.svd(normalised_proxies(weights, rows), compute_uv=False) ** 2
    assert seeds.explained_variance == pytest.approx(energies[:SIZE].sum() / energies.sum(), rel=1e-6)


def test_streamed_in_small_blocks(case: tuple[Array, Family, Rows, Seeds]) -> None:
    _, family, rows, whole = case
    steps: list[float] = []
    streamed = ts_pca(seed_task(family, rows, SIZE, block_bytes=1, advance=steps.append))
    assert len(list(filter(None, steps))) == 2 * RANK and sum(steps) == pytest.approx(2)
    np.testing.assert_allclose(streamed.bank.numpy(), whole.bank.numpy(), atol=1e-5)
    np.testing.assert_allclose(streamed.codes, whole.codes, atol=1e-4)


def test_proxy_error_is_that_of_scipy_nnls(case: tuple[Array, Family, Rows, Seeds]) -> None:
    weights, family, rows, seeds = case
    x = normalised_proxies(weights, rows)
    bank = seeds.bank.roll(1, 1).contiguous()  # not the seeds themselves
    atoms = bank.numpy().reshape(SIZE, -1).astype(np.float64)
    wanted = np.mean([scipy.optimize.nnls(atoms.T, row)[1] ** 2 for row in x])
    assert proxy_error(make_pool(family, rows), bank, 1 << 20, silent) == pytest.approx(wanted, abs=2e-6)


def test_experts_of_zeros_weigh_nothing(tmp_path: Path) -> None:
    weights = planted(4, experts=12, p=20, d=16, rank=4, atoms=6)
    padded = np.concatenate([weights, np.zeros((4, 20, 16))])
    settings = Settings(selector="uniform")
    found = []
    for name, experts in (("plain", weights), ("padded", padded)):
        family = make_family(tmp_path / name, experts)
        rows = make_rows(family, 4, settings)
        seeds = ts_pca(seed_task(family, rows, 3))
        found.append((seeds, proxy_error(make_pool(family, rows), seeds.bank, 1 << 20, silent)))
    (plain, plain_error), (with_zeros, padded_error) = found
    assert with_zeros.explained_variance == pytest.approx(plain.explained_variance, rel=1e-6)
    np.testing.assert_allclose(with_zeros.bank.numpy(), plain.bank.numpy(), atol=1e-5)
    np.testing.assert_allclose(with_zeros.codes[:12], plain.codes, atol=1e-5)
    assert padded_error == pytest.approx(plain_error, rel=1e-5)


def test_more_atoms_than_directions_are_refused(tmp_path: Path) -> None:
    five = planted(5, experts=5, p=20, d=16, rank=4, atoms=5)
    family = make_family(tmp_path, np.concatenate([five, 2 * five]))
    rows = make_rows(family, 4, Settings())
    assert len(ts_pca(seed_task(family, rows, 5)).bank) == 5
    with pytest.raises(GlobeError, match="span 5 directions, fewer than the 6 atoms"):
        ts_pca(seed_task(family, rows, 6))
