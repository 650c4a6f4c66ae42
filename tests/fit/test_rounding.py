"""Rounding of factors: to the nearest, and with feedback in a Hessian."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from globe.compute.spd import orthonormal_rows  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.fit.rounding import Feedback, Rounded, round_atoms, round_nearest, round_with_feedback  # noqa: E402


def loss(matrix: torch.Tensor, rounded: Rounded, hessian: torch.Tensor) -> float:
    error = (matrix - rounded.matrix()).double()
    return float(((error @ hessian.double()) * error).sum())


def problem(rows: int, inner: int, seed: int, least: float = -2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(inner, 2 * inner, generator=generator, dtype=torch.float64)
    spread *= torch.logspace(0, least, inner, dtype=torch.float64)[:, None]
    mixing = torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=torch.float64))[0]
    return torch.randn(rows, inner, generator=generator), mixing @ (spread @ spread.T) @ mixing.T


def the_same(found: Rounded, expected: Rounded) -> bool:
    return torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_nearest_of_the_grid(bits: int) -> None:
    matrix, _ = problem(5, 96, 0)
    found = round_nearest(matrix, bits, 32)
    grid = torch.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1))
    step = found.scales.repeat_interleave(32, 1)
    nearest = (matrix[..., None] - grid * step[..., None]).abs().amin(-1)
    torch.testing.assert_close((matrix - found.matrix()).abs(), nearest)
    assert torch.equal(found.scales, found.scales.bfloat16().float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_the_best_of_those_looked_at(bits: int) -> None:
    """No other scale of either sign is better by more than a grid of eight leaves."""
    matrix, _ = problem(40, 32, 2)
    top = 2 ** (bits - 1)
    found = loss(matrix, round_nearest(matrix, bits, 32), torch.eye(32))
    tried = torch.linspace(-1.1, 1.1, 401)[torch.arange(401) != 200][:, None] * matrix.abs().amax(1) / top
    codes = (matrix / tried[..., None]).round().clamp(-top, top - 1)
    best = (matrix - codes * tried[..., None]).double().square().sum(2).amin(0)
    assert float(best.sum()) <= found < 1.1 * float(best.sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_loses_less_than_the_nearest(bits: int) -> None:
    for seed in range(3):
        matrix, hessian = problem(16, 64, seed)
        nearest, fed = round_nearest(matrix, bits, 32), round_with_feedback(matrix, hessian, bits, 32)
        assert loss(matrix, fed, hessian) < 0.5 * loss(matrix, nearest, hessian)


def test_feedback_against_all_roundings() -> None:
    """Brute force over the two integers beside every value, at the scales that were taken."""
    ups, beyond = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8))), []
    for seed in range(20):
        matrix, hessian = problem(1, 8, seed, -1)
        given = matrix.clone()
        fed = round_with_feedback(matrix, hessian, 4, 8)
        assert torch.equal(matrix, given)
        every = (matrix / fed.scales).floor() + ups
        errors = (matrix - every.clamp(-8, 7) * fed.scales).double()
        losses = ((errors @ hessian) * errors).sum(1)
        beyond.append(loss(matrix, fed, hessian) / float(losses.min()))
    assert sum(beyond) / len(beyond) < 3


@given(st.integers(0, 1000), st.sampled_from([3, 4, 8]), st.sampled_from([8, 16, 48]))
@settings(max_examples=10, deadline=None)
def test_no_column_loses_more_than_half_a_step(seed: int, bits: int, group: int) -> None:
    """tr(E H Eᵀ) ≤ Σ V[k, k]² s² / 4 where no value lies beyond the grid."""
    matrix, hessian = problem(3, 48, seed, -1)
    fed = round_with_feedback(matrix, hessian, bits, group)
    feedback = Feedback.of(hessian)
    assert feedback is not None
    top, step = 2 ** (bits - 1), fed.scales.repeat_interleave(group, 1).double()
    most = (step.square() * feedback.weights.double()).sum(1) / 4 * float(hessian.diagonal().mean())
    errors = (matrix - fed.matrix()).double()
    inside = ((fed.codes > -top) & (fed.codes < top - 1)).all(1)
    assert bool((((errors @ hessian) * errors).sum(1) <= most * (1 + 1e-4))[inside].all())


def test_feedback_is_the_best_move_of_what_follows() -> None:
    """What the first column loses, with the others free to move: V[0, 0]² e², moved by U[0, 1:] / U[0, 0]."""
    _, hessian = problem(1, 12, 5)
    found = Feedback.of(hessian)
    assert found is not None
    hessian = hessian / hessian.diagonal().mean()
    hessian.diagonal().add_(1e-4)
    best = -torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0])
    error = torch.cat([torch.ones(1, dtype=torch.float64), best])
    torch.testing.assert_close(found.factor[0, 1:].double(), best, rtol=1e-4, atol=1e-4)
    assert float(found.weights[0]) == pytest.approx(float(error @ hessian @ error), rel=1e-4)
    determinant = float(found.weights.double().log().sum())
    assert abs(determinant - float(torch.linalg.slogdet(hessian)[1])) < 1e-3


def test_feedback_in_a_multiple_of_the_identity_is_the_nearest() -> None:
    matrix, _ = problem(7, 64, 1)
    for scale in (1e-30, 1.0, 1e30):
        assert the_same(round_with_feedback(matrix, scale * torch.eye(64), 4, 32), round_nearest(matrix, 4, 32))


def test_feedback_in_a_diagonal_hessian_rounds_every_column_to_the_nearest() -> None:
    matrix, _ = problem(7, 64, 1)
    found = round_with_feedback(matrix, torch.logspace(-2, 2, 64).diag(), 4, 32)
    step = found.scales.repeat_interleave(32, 1)
    assert torch.equal(found.codes, (matrix / step).round().clamp(-8, 7).to(torch.int8))


def test_scales_of_hessian_and_rows_change_nothing() -> None:
    matrix, hessian = problem(6, 64, 6)
    found = round_with_feedback(matrix, hessian, 4, 32)
    powers = 2.0 ** torch.tensor([-40, -3, 0, 1, 30, 60])
    scaled = round_with_feedback(matrix * powers[:, None], hessian * 2.0**50, 4, 32)
    assert torch.equal(found.codes, scaled.codes)
    assert torch.equal(found.scales * powers[:, None], scaled.scales)
    alone = round_with_feedback(matrix[2:3], hessian, 4, 32)
    assert torch.equal(found.codes[2:3], alone.codes)


def test_orthonormal_rows_are_good_to_round_in() -> None:
    """A bank's coordinates in which a mixture has weak rows give left factors that cancel; orthonormal ones do not."""
    generator = torch.Generator().manual_seed(7)
    weights, mixing = torch.randn(80, 96, generator=generator), torch.randn(32, 32, generator=generator)
    mixture = (mixing * torch.logspace(0, -2, 32)) @ torch.randn(32, 96, generator=generator)

    def lost(rows: torch.Tensor) -> float:
        wide = rows.double()
        hessian = wide @ wide.T
        left = torch.linalg.solve(hessian, wide @ weights.double().T).T.float()
        return loss(left, round_with_feedback(left, hessian, 4, 32), hessian)

    rows = orthonormal_rows(mixture[None])[0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(32), rtol=0, atol=1e-4)
    assert lost(rows) < 0.1 * lost(mixture)


@pytest.mark.parametrize("bits", [4, 8])
def test_atoms_lose_less_with_feedback_on_both_sides(bits: int) -> None:
    bank, columns = torch.randn(3, 80, 64, generator=torch.Generator().manual_seed(9)), problem(1, 64, 10)[1]
    rows = torch.stack([problem(1, 80, seed, -1.5)[1] for seed in (11, 12)] + [torch.zeros(80, 80)]).float()

    def lost(found: Rounded) -> list[float]:
        errors = (bank - found.matrix().view_as(bank)).double()
        return [float(((s.double() @ e @ columns) * e).sum()) for s, e in zip(rows, errors, strict=True)]

    both = round_atoms(bank, rows.clone(), columns, bits, 32)
    one = round_with_feedback(bank.flatten(0, 1), columns, bits, 32)
    assert all(a < 0.7 * b for a, b in zip(lost(both)[:2], lost(one)[:2], strict=True))
    assert torch.equal(both.codes[160:], one.codes[160:])  # of an atom without use
    alone = round_atoms(bank[1:2], rows[1:2].clone(), columns, bits, 32)
    assert torch.equal(alone.codes, both.codes[80:160])


def test_atoms_with_rows_that_weigh_alike_are_rounded_in_the_columns() -> None:
    bank, columns = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(9)), problem(1, 64, 10)[1]
    rows = torch.eye(40).repeat(2, 1, 1) * torch.tensor([1e-20, 3.0])[:, None, None]
    found = round_atoms(bank, rows.clone(), columns, 4, 32)
    assert the_same(found, round_with_feedback(bank.flatten(0, 1), columns, 4, 32))
    assert the_same(round_atoms(bank, rows, 0 * columns, 4, 32), round_nearest(bank.flatten(0, 1), 4, 32))


def test_zeros_singular_and_ill_conditioned_hessians() -> None:
    matrix, hessian = problem(4, 32, 3)
    matrix[1] = 0
    for each in (torch.zeros(32, 32), torch.ones(32, 32), hessian, problem(1, 32, 4, -9)[1]):
        found = round_with_feedback(matrix, each, 4, 32)
        assert bool(found.matrix().isfinite().all()) and bool((found.scales != 0).all())
        assert bool((found.matrix()[1] == 0).all())
        assert loss(matrix, found, each) <= loss(matrix, round_nearest(matrix, 4, 32), each)


def test_no_bit_depends_on_the_threads() -> None:
    matrix, hessian = problem(300, 256, 8)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(round_with_feedback(matrix, hessian, 4, 32))
    finally:
        torch.set_num_threads(threads)
    assert all(the_same(found[0], other) for other in found[1:])


def test_refusals() -> None:
    matrix, hessian = problem(2, 32, 4)
    with pytest.raises(GlobeError, match="groups of 24"):
        round_nearest(matrix, 4, 24)
    with pytest.raises(GlobeError, match="Hessian"):
        round_with_feedback(matrix, hessian * float("nan"), 4, 32)
    with pytest.raises(GlobeError, match="NaN or Inf"):
        round_nearest(matrix / 0, 4, 32)
