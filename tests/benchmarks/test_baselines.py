"""Every baseline of the comparison against an oracle, on small matrices."""

from __future__ import annotations

import math

import pytest
import torch
from baselines import METHODS, TIMED, Layer, Task, d2, mobe, svd
from baselines.task import energy, error, fit_left

SHAPES = [(12, 20), (20, 12)]
ROUNDING = 1e-4  # relative, of factors in bf16


def make_layer(seed: int, p: int, d: int, *, experts: int = 4, columns: bool = False, rows: bool = False) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def moments(count: int, size: int) -> torch.Tensor:
        data = torch.randn(count, 3 * size, size, generator=generator, dtype=torch.float64)
        data *= torch.logspace(0, 1.5, size, dtype=torch.float64)
        return data.mT @ data / (3 * size)

    weights = torch.randn(experts, p, d, generator=generator)
    return Layer(weights, moments(1, d)[0] if columns else None, moments(experts, p) if rows else None)


def make_task(layers: list[Layer], ratio: float, seconds: float | None = None) -> Task:
    experts, p, d = layers[0].weights.shape
    return Task(layers, experts, p, d, int(2 * ratio * experts * p * d), seconds)


@pytest.mark.parametrize(("p", "d"), SHAPES)
@pytest.mark.parametrize(("columns", "rows"), [(False, False), (True, False), (False, True), (True, True)])
def test_svd_reaches_the_bound_of_eckart_and_young(p: int, d: int, columns: bool, rows: bool) -> None:
    layer = make_layer(0, p, d, columns=columns, rows=rows)
    task = make_task([layer], 0.7)
    found = svd.fit(task)
    rank = found.about["rank"]
    bound = total = 0.0
    for number, matrix in enumerate(layer.weights.double()):
        left = torch.linalg.cholesky(layer.rows[number]).mT if layer.rows is not None else torch.eye(p).double()
        right = torch.linalg.cholesky(layer.columns) if layer.columns is not None else torch.eye(d).double()
        values = torch.linalg.svdvals(left @ matrix @ right).square()
        bound, total = bound + float(values[rank:].sum()), total + float(values.sum())
    approximation = next(found.layers)
    reached = error(layer, approximation)
    assert bound * (1 - 1e-6) <= reached <= bound + ROUNDING * total
    assert all(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5) <= rank for matrix in approximation)


def test_whitened_truncation_beats_plain_truncation_and_perturbations_in_its_metric() -> None:
    layer = make_layer(1, 12, 20, columns=True)
    assert layer.columns is not None
    best = svd.truncate(layer.weights, 4, layer.columns, None)
    plain = svd.truncate(layer.weights, 4, None, None)
    assert error(layer, best) < error(layer, plain)
    assert error(Layer(layer.weights), plain) < error(Layer(layer.weights), best)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        span = torch.linalg.svd(best, full_matrices=False)[2][:, :4]
        moved = span + 0.05 * torch.randn(span.shape, generator=generator)
        refitted = fit_left(moved, layer.weights, layer.columns) @ moved
        assert error(layer, best) < error(layer, refitted)


@pytest.mark.parametrize("columns", [False, True])
def test_shared_is_the_pca_of_the_stacked_experts(columns: bool) -> None:
    layer = make_layer(3, 12, 20, columns=columns)
    found = METHODS["shared"](make_task([layer], 0.5))
    right = torch.linalg.cholesky(layer.columns) if layer.columns is not None else torch.eye(20).double()
    values = torch.linalg.svdvals(layer.weights.flatten(0, 1).double() @ right).square()
    bound = float(values[found.about["rank"] :].sum())
    assert bound * (1 - 1e-6) <= error(layer, next(found.layers)) <= bound + ROUNDING * float(values.sum())


def test_a_base_without_deltas_is_the_mean() -> None:
    layer = make_layer(4, 12, 20)
    task = Task([layer], 4, 12, 20, 2 * 12 * 20)
    assert d2.Form(None, 0, False) in d2.candidates(task)
    mean = layer.weights.mean(0)
    assert torch.equal(d2.approximate(layer, d2.Form(None, 0, False)), mean.bfloat16().float().expand(4, -1, -1))
    used = Layer(layer.weights, shares=torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert torch.equal(d2.approximate(used, d2.Form(None, 0, True))[0], layer.weights[2].bfloat16().float())


def test_a_base_finds_what_experts_share() -> None:
    generator = torch.Generator().manual_seed(5)
    deltas = torch.randn(4, 12, 2, generator=generator) @ torch.randn(4, 2, 20, generator=generator)
    layer = Layer(3 * torch.randn(12, 20, generator=generator) + deltas - deltas.mean(0))
    task = make_task([layer], 1.4)  # holds the mean and deltas of rank 8, which theirs have
    found = METHODS["d2"](task)
    assert error(layer, next(found.layers)) < ROUNDING * energy(layer.weights)
    assert found.about["base_rank"] is None


@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
@pytest.mark.parametrize("columns", [False, True])
def test_mobe_recovers_what_it_could_have_made(activation: str, columns: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.tensor([[4.0, 0, 0], [2, 1, 0], [0, 4, 0], [0, 2, 1], [0, 0, 4], [1, 0, 2]])
    atoms = torch.randn(3, 6, 24, generator=generator)
    right = mobe.ACTIVATIONS[activation]((codes.softmax(1) @ atoms.flatten(1)).view(6, 6, 24))
    metric = make_layer(7, 12, 24, columns=columns).columns
    layer = Layer(torch.randn(6, 12, 6, generator=generator) @ right, metric)
    total = energy(layer.weights, layer.columns)
    choice = mobe.Choice(3, 6, 0.02, 1.0)
    ticks = iter(range(10**6))

    def after(steps: int) -> float:
        return error(layer, mobe.train(layer, activation, choice, steps, lambda: float(next(ticks)))[0]) / total

    start, end = after(1), after(500)
    assert end < 0.02 and end < start / 5


def test_mobe_never_ends_worse_than_it_began() -> None:
    layer = make_layer(8, 12, 20)
    ticks = iter(range(10**6))
    wild = mobe.Choice(2, 4, 50.0, 1.0)
    began = mobe.train(layer, "none", wild, 0.0, lambda: float(next(ticks)))
    ended = mobe.train(layer, "none", wild, 30.0, lambda: float(next(ticks)))
    assert began[1] == 0 < ended[1] and error(layer, ended[0]) <= error(layer, began[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("columns", "rows"), [(False, False), (True, True)])
def test_bytes_are_within_the_budget_and_near_it(method: str, columns: bool, rows: bool) -> None:
    layers = [make_layer(seed, 12, 20, columns=columns, rows=rows) for seed in (9, 10)]
    task = make_task(layers, 0.8, 0.1 if method in TIMED else None)
    found = METHODS[method](task)
    assert found.stored_bytes <= 2 * task.budget
    step = 2 * 2 * (4 * 12 + 4 * 20)  # a rank more would not fit
    assert found.stored_bytes > 2 * task.budget - step
    approximations = list(found.layers)
    assert len(approximations) == 2
    for layer, approximation in zip(layers, approximations, strict=True):
        assert approximation.shape == layer.weights.shape
        assert error(layer, approximation) < 0.6 * energy(layer.weights, layer.columns, layer.rows)
    assert math.isfinite(found.about.get("tuning_seconds", 0.0))
