"""Rounding of whole experts and of factors: oracles, bytes, and the libraries where they are installed."""

from __future__ import annotations

import itertools

import pytest
import torch
from baselines import METHODS, ROUNDED, ROUNDINGS, TIMED, Bits, Layer, Task
from baselines.factors import largest_rank, turned
from baselines.grid import round_nearest, round_with_feedback
from baselines.libraries import LIBRARIES
from baselines.task import energy, error
from test_baselines import make_layer

PACKAGES = {"hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao", "llm-compressor": "llmcompressor"}


def make_hessian(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    data *= torch.logspace(0, 1.5, size, dtype=torch.float64)
    data @= torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return data.mT @ data / len(data)


def weighted(residual: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((residual.double() @ hessian) * residual.double()).sum())


@pytest.mark.parametrize("text", ["4g32", "4g16z", "3g16", "3g16z", "2g16", "2g32z"])
def test_values_lie_on_a_grid_of_so_many_bits(text: str) -> None:
    bits = Bits.parse(text)
    matrix = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for rounded in (round_nearest(matrix, bits), round_with_feedback(matrix, make_hessian(40), bits)):
        for row, first in itertools.product(rounded, range(0, 40, bits.group)):  # the last group is shorter
            steps = row[first : first + bits.group].unique().diff()
            assert len(steps) < 2**bits.bits
            if len(steps):  # whole multiples of a scale, of which the least step may be one itself
                counts = torch.arange(1, 2**bits.bits)[:, None] * steps / steps.min()
                assert ((counts - counts.round()).abs() < 1e-3 * counts).all(1).any()


@pytest.mark.parametrize("text", ["8", "8g16z", "4g32", "4g16z", "3g16", "2g32z"])
def test_bytes_and_the_worst_error(text: str) -> None:
    bits = Bits.parse(text)
    groups = -(-40 // bits.group)
    each = 40 * bits.bits + groups * (16 + (bits.bits if bits.zeros else 0))
    assert bits.bytes(5, 40) == -(-5 * each // 8) and Bits.parse(str(bits)) == bits
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
    error = (matrix - round_nearest(matrix, bits)).square().mean().sqrt() / matrix.square().mean().sqrt()
    assert error < 3 * 2.0**-bits.bits


def test_what_lies_on_the_grid_stays() -> None:
    codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::32] = -8
    matrix = codes * 0.125
    assert torch.equal(round_nearest(matrix, Bits(4, 32)), matrix)
    assert torch.allclose(round_with_feedback(matrix, make_hessian(64), Bits(4, 32)), matrix)


def test_feedback_rounds_what_is_best_given_the_columns_before() -> None:
    """Each column against the exact minimiser over all that are still free, of the damped Hessian."""
    size = 32
    hessian = make_hessian(size, 3)
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(size)
    for row in torch.randn(4, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64):
        found = round_with_feedback(row[None].float(), hessian, Bits(4, size))[0].double()
        levels = found.unique()
        scale = levels.diff().min()
        for k in range(size):
            made = damped[k:, :k] @ (row[:k] - found[:k])
            wanted = (row[k:] + torch.linalg.solve(damped[k:, k:], made))[0]
            assert (found[k] - wanted).abs() < 0.501 * scale or found[k] in (levels[0], levels[-1])


@pytest.mark.parametrize("text", ["4g16", "3g16", "2g16z"])
def test_feedback_helps_in_its_metric_alone(text: str) -> None:
    bits, hessian = Bits.parse(text), make_hessian(48)
    matrix = torch.randn(24, 48, generator=torch.Generator().manual_seed(4))
    plain, fed = round_nearest(matrix, bits), round_with_feedback(matrix, hessian, bits)
    assert weighted(matrix - fed, hessian) < 0.8 * weighted(matrix - plain, hessian)
    assert weighted(matrix - fed, torch.eye(48).double()) > weighted(matrix - plain, torch.eye(48).double())
    assert torch.equal(fed, round_with_feedback(matrix, 1e9 * hessian, bits))
    independent = round_with_feedback(matrix, torch.eye(48).double(), bits)
    assert torch.allclose(independent, plain)
    assert torch.equal(round_with_feedback(matrix, torch.zeros(48, 48), bits), plain)


def test_unknown_bits_are_refused() -> None:
    for text in ("5", "4g", "4z", "g32", "4g0", "4g32zz", ""):
        with pytest.raises(ValueError, match="expected 2, 3, 4 or 8"):
            Bits.parse(text)


def test_turned_atoms_span_the_same_rows() -> None:
    atoms = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(5))
    found = turned(atoms)
    torch.testing.assert_close((found @ found.mT).mean(0), torch.eye(5).double())
    change = torch.linalg.lstsq(atoms[0].double().mT, found[0].mT).solution.mT
    torch.testing.assert_close(change @ atoms.double(), found)


def test_the_largest_rank_that_fits() -> None:
    assert [largest_rank(budget, lambda rank: 10 * rank, 7) for budget in (9, 10, 39, 70, 1000)] == [0, 1, 3, 7, 7]


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_whole_experts_in_few_bits(name: str, transposed: bool) -> None:
    if name in LIBRARIES:
        pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed")
    made = make_layer(6, 32, 64, columns=not transposed, rows=transposed)
    layer = Layer(made.weights, made.columns, made.rows, transposed=transposed)
    errors = []
    for text in ("2g32", "4g32", "8g32"):
        task = Task([layer], 4, 32, 64, 0, bits=Bits.parse(text))
        found = ROUNDINGS[name](task)
        approximation = next(found.layers)
        assert approximation.shape == layer.weights.shape
        errors.append(error(layer, approximation) / energy(layer.weights, layer.columns, layer.rows))
        assert found.stored_bytes <= 4 * 32 * 64 * (task.bits.bits + 1) / 8 and len(list(found.layers)) == 0
    assert errors[0] < 0.4 and errors[1] < 0.02 and errors[2] < 2e-4


@pytest.mark.parametrize("method", sorted(ROUNDED))
@pytest.mark.parametrize("text", ["8", "4g16"])
def test_factors_in_few_bits_fill_the_budget_with_more_rank(method: str, text: str) -> None:
    layer = make_layer(7, 24, 40, columns=True)
    seconds = 0.05 if method in TIMED else None
    plain = Task([layer], 4, 24, 40, int(2 * 0.3 * 4 * 24 * 40), seconds)
    packed = Task([layer], 4, 24, 40, plain.budget, seconds, bits=Bits.parse(text))
    before, after = METHODS[method](plain), METHODS[method](packed)
    assert after.stored_bytes <= plain.budget and after.about["rank"] > before.about["rank"]
    first, second = (error(layer, next(found.layers)) for found in (before, after))
    assert second < 0.9 * first


def test_bits_that_a_method_needs_or_has_not() -> None:
    layer = make_layer(8, 32, 64)
    with pytest.raises(ValueError, match="name them as in rtn:4g32"):
        ROUNDINGS["rtn"](Task([layer], 4, 32, 64, 0))
    with pytest.raises(ValueError, match="needs activation statistics"):
        list(ROUNDINGS["gptq"](Task([layer], 4, 32, 64, 0, bits=Bits(4, 32))).layers)
