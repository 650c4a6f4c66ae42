"""Left factors against NumPy's least squares, and the ridge where that is ill-conditioned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import Array
from globe.compute.spd import spd_inverse
from globe.fit.lefts import LeftFit, fit_lefts, row_energies, squared_errors
from globe.settings import Settings

EXPERTS, ROWS, RANK, WIDTH = 5, 9, 6, 14


def fit(weights: Array, mixtures: Array, **settings: float) -> LeftFit:
    return fit_lefts(
        torch.from_numpy(weights.astype(np.float32)),
        torch.from_numpy(mixtures.astype(np.float32)),
        Settings(**settings),  # type: ignore[arg-type]
    )


def by_numpy(weights: Array, mixtures: Array) -> Array:
    pairs = zip(weights, mixtures, strict=True)
    return np.stack([np.linalg.lstsq(mixture.T, matrix.T, rcond=None)[0].T for matrix, mixture in pairs])


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_left_factors_are_least_squares(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((EXPERTS, ROWS, WIDTH))
    mixtures = (rng.standard_normal((EXPERTS, RANK, WIDTH)) * scale).astype(np.float32).astype(np.float64)
    found, wanted = fit(weights, mixtures), by_numpy(weights, mixtures)
    condition = max(np.linalg.cond(mixture) for mixture in mixtures)
    error = np.linalg.norm(found.lefts.double().numpy() - wanted) / np.linalg.norm(wanted)
    assert error < 1e-6 * (1 + condition**2)
    assert not found.ridged.any()


def test_errors_are_those_of_the_residual_row_by_row() -> None:
    rng = np.random.default_rng(1)
    weights, mixtures = rng.standard_normal((EXPERTS, ROWS, WIDTH)), rng.standard_normal((EXPERTS, RANK, WIDTH))
    fitted = fit(weights, mixtures)
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (weights, mixtures)]
    for lefts in (fitted.lefts, fitted.lefts.bfloat16().float()):
        found = squared_errors(tensors[0], row_energies(tensors[0]), tensors[1], fitted, lefts)
        wanted = ((weights - lefts.double().numpy() @ mixtures) ** 2).sum(2)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-2])
def test_small_errors_are_those_of_the_residual(noise: float) -> None:
    rng = np.random.default_rng(5)
    mixtures = rng.standard_normal((EXPERTS, RANK, WIDTH))
    weights = rng.standard_normal((EXPERTS, ROWS, RANK)) @ mixtures + noise * rng.standard_normal(
        (EXPERTS, ROWS, WIDTH)
    )
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (weights, mixtures)]
    fitted = fit(weights, mixtures)
    found = squared_errors(tensors[0], row_energies(tensors[0]), tensors[1], fitted, fitted.lefts)
    wanted = ((weights - by_numpy(weights, mixtures) @ mixtures) ** 2).sum((1, 2))
    np.testing.assert_allclose(found.sum(1), wanted, rtol=1e-3, atol=1e-11 * (weights**2).sum())


def test_only_the_ill_conditioned_expert_takes_a_ridge() -> None:
    rng = np.random.default_rng(2)
    weights, mixtures = rng.standard_normal((EXPERTS, ROWS, WIDTH)), rng.standard_normal((EXPERTS, RANK, WIDTH))
    mixtures[3, 5] = mixtures[3, 4] + 1e-6 * mixtures[3, 5]
    found = fit(weights, mixtures, ridge=1e-4)
    assert found.ridged.tolist() == [False, False, False, True, False]
    gram = mixtures[3] @ mixtures[3].T
    shifted = gram + 1e-4 * np.diag(gram).mean() * np.eye(RANK)
    wanted = np.linalg.solve(shifted, mixtures[3] @ weights[3].T).T
    np.testing.assert_allclose(found.lefts[3].numpy(), wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("defect", [0.0, 1e-6, 1e-4, 1e-3])
def test_nearly_singular_mixtures_survive_storage_in_bf16(defect: float) -> None:
    rng = np.random.default_rng(4)
    low_rank = rng.standard_normal((EXPERTS, 64, 48)) @ rng.standard_normal((EXPERTS, 48, 128)) / np.sqrt(48)
    mixtures = low_rank + defect * rng.standard_normal(low_rank.shape)
    weights = rng.standard_normal((EXPERTS, 96, 128))
    found = fit(weights, mixtures)
    assert found.ridged.all()
    residual = weights - found.lefts.bfloat16().double().numpy() @ mixtures
    without = weights - by_numpy(weights, low_rank) @ low_rank  # the weak directions given up
    assert (residual**2).sum() < 1.05 * (without**2).sum()


@pytest.mark.parametrize("kind", ["repeated row", "zero row", "all zero", "more rows than columns"])
def test_singular_mixtures_still_fit(kind: str) -> None:
    rng = np.random.default_rng(3)
    rank = WIDTH + 2 if kind == "more rows than columns" else RANK
    weights, mixtures = rng.standard_normal((EXPERTS, ROWS, WIDTH)), rng.standard_normal((EXPERTS, rank, WIDTH))
    mixtures[2] = rng.standard_normal((rank, 3)) @ rng.standard_normal((3, WIDTH))
    if kind == "repeated row":
        mixtures[:, 1] = mixtures[:, 0]
    elif kind == "zero row":
        mixtures[:, 1] = 0
    elif kind == "all zero":
        mixtures[:] = 0
    found = fit(weights, mixtures)
    assert found.ridged.all()
    residual = weights - found.lefts.double().numpy() @ mixtures
    best = weights - by_numpy(weights, mixtures) @ mixtures
    assert (residual**2).sum() <= (best**2).sum() + 1e-3 * (weights**2).sum()


@given(
    seed=st.integers(0, 10**6),
    spectrum=st.lists(st.floats(-3, 0), min_size=2, max_size=8),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_inverses_of_well_conditioned_matrices(seed: int, spectrum: list[float], scale: float) -> None:
    rng = np.random.default_rng(seed)
    size = len(spectrum)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    matrix = (scale * (basis * 10.0 ** np.array(spectrum)) @ basis.T).astype(np.float32)
    inverse, ridged = spd_inverse(torch.from_numpy(matrix[None]), 1e-2, 1e-6)
    assert not ridged.any()
    product = inverse[0].double().numpy() @ ((matrix + matrix.T) / 2).astype(np.float64)
    np.testing.assert_allclose(product, np.eye(size), atol=1e-3)


@pytest.mark.parametrize(("smallest", "ridged"), [(1e-3, False), (1e-5, True)])
def test_the_threshold_of_ill_conditioning(smallest: float, ridged: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, smallest]))[None]
    inverse, flags = spd_inverse(matrix, ridge=0.01, rcond=1e-4)
    assert flags.tolist() == [ridged]
    shift = 0.01 * (1 + smallest) / 2 if ridged else 0.0
    np.testing.assert_allclose(inverse[0].diagonal(), [1 / (1 + shift), 1 / (smallest + shift)], rtol=1e-5)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.1])
def test_a_matrix_that_noise_makes_indefinite_is_lifted(noise: float) -> None:
    rng = np.random.default_rng(8)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    values = np.geomspace(1, 1e-2, 40)
    values[-1] = -noise
    matrix = (basis * values) @ basis.T
    inverse, flags = spd_inverse(torch.from_numpy(matrix[None]), ridge=1e-9, rcond=1e-12)
    assert bool(flags[0])
    found = np.linalg.eigvalsh(inverse[0].double().numpy())
    assert found.min() > 0 and found.max() < 1.1 / noise
