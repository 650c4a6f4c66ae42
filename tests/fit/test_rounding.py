"""Rounding of factors: to the nearest, and with feedback in a Hessian."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from globe.errors import GlobeError  # noqa: E402
from globe.fit.rounding import Rounded, round_nearest, round_with_feedback  # noqa: E402


def loss(matrix: torch.Tensor, rounded: Rounded, hessian: torch.Tensor) -> float:
    error = (matrix - rounded.matrix()).double()
    return float(((error @ hessian) * error).sum())


def problem(rows: int, inner: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(inner, 2 * inner, generator=generator, dtype=torch.float64)
    spread *= torch.logspace(0, -2, inner, dtype=torch.float64)[:, None]
    mixing = torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=torch.float64))[0]
    return torch.randn(rows, inner, generator=generator), mixing @ (spread @ spread.T) @ mixing.T


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_nearest_is_within_half_a_step_and_keeps_the_grid(bits: int) -> None:
    matrix, _ = problem(5, 96, 0)
    found = round_nearest(matrix, bits, 32)
    step = found.scales.repeat_interleave(32, 1)
    assert bool(((matrix - found.matrix()).abs() <= step * (0.5 + 2.0 ** (bits - 9))).all())
    assert int(found.codes.min()) >= -(2 ** (bits - 1)) and int(found.codes.max()) < 2 ** (bits - 1)
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    again = round_nearest(found.matrix(), bits, 32)
    torch.testing.assert_close(again.matrix(), found.matrix(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_loses_less_than_the_nearest(bits: int) -> None:
    for seed in range(3):
        matrix, hessian = problem(16, 64, seed)
        nearest, fed = round_nearest(matrix, bits, 32), round_with_feedback(matrix, hessian, bits, 32)
        assert loss(matrix, fed, hessian) < 0.7 * loss(matrix, nearest, hessian)


def test_feedback_in_a_diagonal_hessian_is_the_nearest() -> None:
    matrix, _ = problem(7, 64, 1)
    fed = round_with_feedback(matrix, torch.logspace(-3, 3, 64).diag(), 4, 32)
    assert torch.equal(fed.codes, round_nearest(matrix, 4, 32).codes)


def test_zeros_and_singular_hessians() -> None:
    matrix, hessian = problem(4, 32, 3)
    matrix[1] = 0
    for each in (torch.zeros(32, 32), torch.ones(32, 32), hessian):
        found = round_with_feedback(matrix, each, 4, 32)
        assert bool(found.matrix().isfinite().all()) and bool((found.scales > 0).all())
        assert bool((found.matrix()[1] == 0).all())


def test_refusals() -> None:
    matrix, hessian = problem(2, 32, 4)
    with pytest.raises(GlobeError, match="groups of 24"):
        round_nearest(matrix, 4, 24)
    with pytest.raises(GlobeError, match="Hessian"):
        round_with_feedback(matrix, hessian * float("nan"), 4, 32)
    with pytest.raises(GlobeError, match="NaN or Inf"):
        round_nearest(matrix / 0, 4, 32)
