"""Residual-greedy seeds, which see a Gram alone, against NNLS, lasso and SVD on the vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
from test_seeds import normalised_proxies

from families import Array, make_family, make_rows, planted, seed_task
from globe.checkpoint.family import Family
from globe.errors import GlobeError
from globe.seeds import hybrid_replace, residual_greedy, ts_pca
from globe.seeds.proxies import Rows
from globe.settings import Settings

RANK, SIZE = 5, 8


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Array, Family, Rows]:
    weights = planted(0, experts=30, p=16, d=10, rank=4, atoms=8, uses=3, noise=0.2) + 0.5
    family = make_family(tmp_path_factory.mktemp("greedy"), weights.astype(np.float32).astype(np.float64))
    rows = make_rows(family, RANK, Settings())
    return normalised_proxies(weights, rows), family, rows


def coded(x: Array, atoms: Array, codes: str) -> Array:
    if not len(atoms):
        return np.zeros((len(x), 0))
    if codes == "nnls":
        return np.array([scipy.optimize.nnls(atoms.T, row)[0] for row in x])
    found = []
    for row in x:
        penalty = 0.1 * np.abs(atoms @ row).max() / len(row)
        lasso = sklearn.linear_model.Lasso(penalty, fit_intercept=False, positive=True, tol=1e-12, max_iter=100_000)
        found.append(lasso.fit(atoms.T, row).coef_)
    return np.array(found)


def grown(x: Array, atoms: Array, size: int, codes: str) -> Array:
    """Add the leading singular vector of the coded residuals until there are `size` atoms."""
    while len(atoms) < size:
        residuals = x - coded(x, atoms, codes) @ atoms
        left, _, right = np.linalg.svd(residuals, full_matrices=False)
        positive = (np.maximum(left[:, 0], 0) ** 2).sum() >= 0.5
        atoms = np.vstack([atoms, right[0] if positive else -right[0]])
    return atoms


@pytest.mark.parametrize("codes", ["nnls", "lasso"])
def test_atoms_are_the_leading_singular_vectors_of_the_residuals(codes: str, case: tuple[Array, Family, Rows]) -> None:
    x, family, rows = case
    found = residual_greedy(seed_task(family, rows, SIZE, greedy_codes=codes)).bank.flatten(1).numpy()
    wanted = grown(x, np.empty((0, x.shape[1])), SIZE, codes)
    np.testing.assert_allclose(np.abs((found * wanted).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_every_atom_lowers_the_error_and_beats_pca(case: tuple[Array, Family, Rows]) -> None:
    _, family, rows = case
    errors = [residual_greedy(seed_task(family, rows, size)).proxy_error for size in range(1, 12)]
    assert (np.diff(errors) < 0).all()
    assert errors[SIZE - 1] < ts_pca(seed_task(family, rows, SIZE)).proxy_error


@pytest.mark.parametrize(("share", "replaced"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_hybrid_replace_gives_up_what_explains_least(
    share: float, replaced: int, case: tuple[Array, Family, Rows]
) -> None:
    x, family, rows = case
    first = ts_pca(seed_task(family, rows, SIZE)).bank.flatten(1).double().numpy()
    explained = (np.maximum(x @ first.T, 0) ** 2).sum(0)  # the atoms are orthonormal
    kept = first[np.sort(np.argsort(-explained)[: SIZE - replaced])]
    found = hybrid_replace(seed_task(family, rows, SIZE, hybrid_share=share))
    wanted = grown(x, kept, SIZE, "nnls")
    np.testing.assert_allclose(found.bank.flatten(1), wanted, atol=1e-2)


def test_atoms_may_outnumber_the_directions_while_codes_leave_something(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    plane = np.random.default_rng(1).standard_normal((2, 8, 6))
    weights = np.cos(angles)[:, None, None] * plane[0] + np.sin(angles)[:, None, None] * plane[1]
    family = make_family(tmp_path, weights)
    seeds = residual_greedy(seed_task(family, make_rows(family, 3, Settings()), 3))
    assert seeds.proxy_error < 1e-4
    with pytest.raises(GlobeError, match="are spanned by 3 directions"):
        residual_greedy(seed_task(family, make_rows(family, 3, Settings()), 4))
