"""Factors in every form: batches as one by one, ridges where they are needed, CholeskyQR where there is no fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from families import Array
from forms import FORMS, form
from globe.compute.gemm import GramSum, bank_gram, correlations, grams, mixtures, scatter_add
from globe.compute.spd import gram_inverse, ridged_factor, row_basis, spd_inverse

every_form = pytest.mark.parametrize("name", FORMS)
COUNT, SIZE, WIDTH = 5, 24, 60


def rows(seed: int, condition: float, *, count: int = COUNT, size: int = SIZE, width: int = WIDTH) -> torch.Tensor:
    """Matrices (n, r, d) of that condition, in fp32."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, 1 / condition, size)
    made = []
    for _ in range(count):
        left, right = (
            np.linalg.qr(rng.standard_normal((size, size)))[0],
            np.linalg.qr(rng.standard_normal((width, size))),
        )
        made.append((left * values) @ right[0].T)
    return torch.from_numpy(np.stack(made).astype(np.float32))


def distance(found: torch.Tensor, wanted: Array) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


def projectors(basis: torch.Tensor) -> Array:
    wide: Array = basis.double().numpy()
    return wide.swapaxes(1, 2) @ wide


@every_form
@pytest.mark.parametrize("condition", [1.0, 100.0, 5000.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rows_get_an_orthonormal_basis(name: str, condition: float, scale: float) -> None:
    matrices = rows(1, condition)
    with form(name):
        inner, basis, ridged = row_basis(matrices * scale, 1e-6, 1e-10)
    assert not ridged.any()
    wide = basis.double()
    torch.testing.assert_close(wide @ wide.mT, torch.eye(SIZE).double().expand(COUNT, -1, -1), rtol=0, atol=1e-5)
    assert distance(inner.double() @ (matrices.double() * scale), wide.numpy()) < 1e-5 * condition
    right = np.linalg.svd(matrices.double().numpy(), full_matrices=False)[2]
    assert distance(torch.from_numpy(projectors(basis)), right.swapaxes(1, 2) @ right) < 1e-6 * condition


@every_form
def test_a_dominating_direction_leaves_the_others(name: str) -> None:
    rng = np.random.default_rng(6)
    plain = rng.standard_normal((2, 64, 200))
    matrices = torch.from_numpy((plain + 1e3 * rng.standard_normal(200)).astype(np.float32))
    with form(name):
        _, basis, ridged = row_basis(matrices, 1e-6, 1e-10)
    assert not ridged.any()
    right = np.linalg.svd(matrices.double().numpy(), full_matrices=False)[2]
    assert distance(torch.from_numpy(projectors(basis)), right.swapaxes(1, 2) @ right) < 1e-3


@every_form
def test_a_basis_of_dependent_rows_is_that_of_the_ridge(name: str) -> None:
    matrices = rows(2, 3.0)
    matrices[1, 4] = matrices[1, 3]
    matrices[2, 5] = 0
    matrices[3] = 0
    with form(name):
        inner, basis, ridged = row_basis(matrices, 1e-4, 1e-10)
        alone = [row_basis(matrices[k : k + 1], 1e-4, 1e-10) for k in range(COUNT)]
    assert ridged.tolist() == [False, True, True, True, False]
    assert [bool(found[2]) for found in alone] == ridged.tolist()
    for number, (mine, others, _) in enumerate(alone):
        torch.testing.assert_close(mine[0], inner[number], rtol=1e-3, atol=1e-3 * float(inner[number].abs().max()))
        torch.testing.assert_close(others[0], basis[number], rtol=1e-3, atol=1e-4)
    wide = matrices.double().numpy()
    gram = wide @ wide.swapaxes(1, 2)
    for number in (1, 2):
        shifted = gram[number] + 1e-4 * np.diag(gram[number]).mean() * np.eye(SIZE)
        wanted = wide[number].T @ np.linalg.solve(shifted, wide[number])
        assert distance(torch.from_numpy(projectors(basis)[number]), wanted) < 1e-4
    assert bool((basis[3] == 0).all()) and torch.allclose(inner[3], torch.eye(SIZE), atol=1e-3)


@every_form
@pytest.mark.parametrize("condition", [1.0, 30.0, 300.0])
def test_inverses_of_grams(name: str, condition: float) -> None:
    matrices = rows(3, condition)
    with form(name):
        inverse, products, ridged = gram_inverse(matrices, 1e-6, 1e-9)
    wide = matrices.double().numpy()
    gram = wide @ wide.swapaxes(1, 2)
    assert not ridged.any() and products.dtype == (torch.float32 if "fp32" in name else torch.float64)
    assert distance(products, gram) < 1e-6
    assert distance(inverse, np.linalg.inv(gram)) < 1e-5 * condition


@every_form
def test_ill_conditioned_grams_take_a_ridge(name: str) -> None:
    matrices = rows(4, 3.0)
    matrices[2, 7] = matrices[2, 6]
    with form(name):
        inverse, products, ridged = gram_inverse(matrices, 1e-3, 1e-5)
    assert ridged.tolist() == [False, False, True, False, False]
    gram = products.double().numpy()
    gram[2] += 1e-3 * np.diag(gram[2]).mean() * np.eye(SIZE)
    assert distance(inverse, np.linalg.inv(gram)) < 1e-3


@every_form
@pytest.mark.parametrize("defect", ["singular", "rank one", "more rows than columns", "huge"])
def test_what_has_no_inverse_still_gives_finite_factors(name: str, defect: str) -> None:
    matrices = rows(5, 10.0)
    if defect == "singular":
        matrices[:, 1:9] = matrices[:, :1]
    elif defect == "rank one":
        matrices = matrices[:, :, :1] * matrices[:, :1]
    elif defect == "more rows than columns":
        matrices = matrices[:, :, :10]
    else:
        matrices = matrices * (1e30 if defect == "huge" and name == "per core" else 1e15)
    with form(name):
        inner, basis, ridged = row_basis(matrices, 0.0, 1e-10)
        inverse, _, also = gram_inverse(matrices.clamp(-1e15, 1e15), 1e-6, 1e-5)
    assert all(bool(found.isfinite().all()) for found in (inner, basis, inverse))
    assert ridged.tolist() == also.tolist() == [defect != "huge"] * COUNT
    assert float(torch.linalg.matrix_norm(basis.double(), 2).max()) < 1.01


@every_form
def test_noise_is_lifted_in_a_batch_as_alone(name: str) -> None:
    rng = np.random.default_rng(8)
    basis = np.linalg.qr(rng.standard_normal((3, 40, 40)))[0]
    values = np.geomspace(1, 1e-2, 40)[None].repeat(3, 0)
    values[:, -1] = [-1e-3, 1e-2, -0.1]
    matrices = torch.from_numpy((basis * values[:, None]) @ basis.swapaxes(1, 2)).float()
    with form(name):
        inverse, ridged = spd_inverse(matrices, ridge=1e-9, rcond=1e-12)
        alone = torch.cat([spd_inverse(matrices[k : k + 1], ridge=1e-9, rcond=1e-12)[0] for k in range(3)])
        factor = ridged_factor(matrices[2].double(), 1e-9)
    assert ridged.tolist() == [True, False, True]
    torch.testing.assert_close(inverse, alone, rtol=1e-3, atol=1e-3)
    for found, noise in zip(inverse, (1e-3, None, 0.1), strict=True):
        spectrum = np.linalg.eigvalsh(found.double().numpy())
        assert spectrum.min() > 0 and (noise is None or spectrum.max() < 1.1 / noise)
    assert bool(factor.isfinite().all()) and float(factor.diagonal().min()) > 0


@every_form
def test_products_are_the_same_in_every_form(name: str) -> None:
    rng = np.random.default_rng(9)
    bank, targets = (torch.from_numpy(rng.standard_normal((k, 30, 300)).astype(np.float32)) for k in (4, 3))
    codes = rng.uniform(0, 1, (3, 4))
    wide, other = bank.flatten(1).double().numpy(), targets.flatten(1).double().numpy()
    total, room = torch.zeros_like(bank), torch.empty(2, 30, 300)
    with form(name):
        np.testing.assert_allclose(correlations(targets, bank), other @ wide.T, atol=1e-3)
        np.testing.assert_allclose(bank_gram(bank), wide @ wide.T, atol=2e-3)
        assert distance(grams(targets), np.einsum("ird,isd->irs", targets.double(), targets.double())) < 1e-6
        assert distance(mixtures(codes, bank).flatten(1), codes @ wide) < 1e-6
        scatter_add(codes, targets, total, room)
        summed = GramSum(4)
        for block in bank.flatten(1).split(4000, 1):
            summed.add(block.contiguous())
        np.testing.assert_allclose(summed.matrix, wide @ wide.T, atol=2e-3)
    assert distance(total.flatten(1), codes.T @ other) < 1e-6
