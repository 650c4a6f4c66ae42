"""The metric of a pool from a synthetic calibration file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dense import dense_own
from families import CPU, planted, write_checkpoint
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError
from globe.settings import Settings
from globe.statistics.calibration import Calibration, LayerStatistics, save_calibration
from globe.statistics.metric import Metric, build_metric
from globe.statistics.own_columns import OwnColumns

LAYERS, EXPERTS, P, D = 2, 3, 6, 8


def moments(generator: torch.Generator, count: int, size: int) -> torch.Tensor:
    root = torch.randn(count, size, size, generator=generator)
    return root @ root.mT / size


def statistics(seed: int, *, full: bool = True) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    hidden = moments(generator, EXPERTS, P)
    return LayerStatistics(
        moment=moments(generator, 1, D)[0],
        residual=torch.tensor(4.0 + seed),
        share=torch.rand(EXPERTS, generator=generator) + 0.1,
        counts=torch.tensor([1000, 10, 0]),
        diagonal=torch.rand(EXPERTS, D, generator=generator) + 0.1,
        gate_rows=torch.rand(EXPERTS, P, generator=generator) + 0.1,
        up_rows=torch.rand(EXPERTS, P, generator=generator) + 0.1,
        hidden=hidden.diagonal(dim1=1, dim2=2),
        hidden_moment=hidden if full else None,
    )


def with_own(found: LayerStatistics, seed: int) -> LayerStatistics:
    """With two directions of the first two experts; the third is as its layer."""
    generator = torch.Generator().manual_seed(seed)
    return replace(
        found,
        own_directions=torch.linalg.qr(torch.randn(EXPERTS, D, 2, generator=generator))[0],
        own_values=torch.tensor([[4.0, -0.5], [0.7, 0.0], [0.0, 0.0]]),
        own_sizes=torch.tensor([2.0, 0.5, 1.0]),
    )


def saved(path: Path, layers: dict[int, LayerStatistics]) -> Calibration:
    return save_calibration(path / "calibration.safetensors", layers, {})


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    weights = planted(0, experts=LAYERS * EXPERTS, p=P, d=D, rank=3, atoms=4)
    root = tmp_path_factory.mktemp("metric") / "model"
    write_checkpoint(root, layers=LAYERS, gate=weights, up=weights, down=weights.swapaxes(1, 2))
    return {name: Checkpoint(root).family(name) for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return saved(tmp_path_factory.mktemp("calibration"), {layer: statistics(layer) for layer in range(LAYERS)})


def build(family: Family, calibration: Calibration, **settings: Any) -> Metric:
    return build_metric(family, calibration, Settings(**settings), CPU)


@pytest.mark.parametrize("name", ["gate", "up"])
def test_columns_are_factors_of_the_damped_moments(
    name: str, families: dict[str, Family], calibration: Calibration
) -> None:
    found = build(families[name], calibration)
    assert found.layers == (0, 0, 0, 1, 1, 1) and sorted(found.columns) == [0, 1]
    assert all(rows.shape == (P,) and rows.dtype == torch.float32 for rows in found.rows)
    for layer, factor in found.columns.items():
        moment = statistics(layer).moment
        damped = moment + 1e-3 * moment.diagonal().mean() * torch.eye(D)
        torch.testing.assert_close(factor @ factor.mT, damped, rtol=1e-4, atol=1e-5)
    weights = families[name].read(4)
    expected = found.rows[4][:, None] * (weights.float() @ (found.scales[4][:, None] * found.columns[1]))  # type: ignore[index]
    torch.testing.assert_close(found.weigh(slice(4, 5), weights.float()[None])[0], expected)
    some, other = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    inner = (found.seen(slice(4, 5), some[None])[0] * other).sum()
    torch.testing.assert_close((some * found.unseen(slice(4, 5), other[None])[0]).sum(), inner, rtol=1e-4, atol=1e-4)


def test_down_has_rows_alone(families: dict[str, Family], calibration: Calibration) -> None:
    found = build(families["down"], calibration)
    assert found.columns == {} and found.layers == (None,) * 6
    for number, rows in enumerate(found.rows):
        layer, expert = divmod(number, EXPERTS)
        mine = statistics(layer)
        assert mine.hidden_moment is not None
        weight = float(mine.share[expert] / mine.residual)
        damped = mine.hidden_moment[expert]
        damped = damped + 1e-3 * damped.diagonal().mean() * torch.eye(P)
        torch.testing.assert_close(rows.mT @ rows, weight * damped, rtol=1e-4, atol=1e-6)  # ‖D W‖² = tr Wᵀ M W
    matrix = torch.randn(P, 5, generator=torch.Generator().manual_seed(0))
    first, third = slice(0, 1), slice(2, 3)
    assert torch.equal(found.seen(first, matrix[None])[0], matrix)
    assert torch.equal(found.unseen(first, matrix[None])[0], matrix)
    torch.testing.assert_close(found.weigh(third, matrix[None])[0], found.rows[2] @ matrix)


def test_down_without_full_moments_is_diagonal(families: dict[str, Family], tmp_path: Path) -> None:
    found = build(families["down"], saved(tmp_path, {k: statistics(k, full=False) for k in range(LAYERS)}))
    mine = statistics(1)
    wanted = (mine.hidden[1].clamp(min=1e-4 * float(mine.hidden[1].mean())) * mine.share[1] / mine.residual).sqrt()
    torch.testing.assert_close(found.rows[4], wanted)


@pytest.mark.parametrize("name", ["gate", "up"])
def test_powers(name: str, families: dict[str, Family], calibration: Calibration) -> None:
    mine = statistics(1)
    diagonal, weight = getattr(mine, f"{name}_rows")[2], mine.share[2]
    flat = build(families[name], calibration, metric_rows=0.0, metric_layers=0.0)
    torch.testing.assert_close(flat.rows[5], weight.sqrt().expand(P))
    whole = build(families[name], calibration, metric_rows=1.0, metric_layers=0.0)
    torch.testing.assert_close(whole.rows[5], (diagonal * weight).sqrt())
    half = build(families[name], calibration, metric_rows=0.5, metric_layers=0.5)
    wanted = diagonal.sqrt() * weight / mine.residual.sqrt()
    torch.testing.assert_close(half.rows[5], wanted.sqrt())


def test_shrinkage(families: dict[str, Family], calibration: Calibration) -> None:
    def squares(shrinkage: float) -> list[torch.Tensor]:
        found = build(families["gate"], calibration, metric_shrinkage=shrinkage)
        assert found.scales is not None
        return [scale.double().square() for scale in found.scales]

    layer = statistics(0)
    common = layer.moment.diagonal().double()
    floor = 1e-3 * common.mean()
    own = (layer.diagonal.double() + floor) / (common + floor)
    torch.testing.assert_close(squares(1e-6)[0], own[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares(1000.0)[0], (own[0] + 1) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares(1000.0)[2], torch.ones(D, dtype=torch.float64))  # it was sent no token
    assert build(families["gate"], calibration, metric_shrinkage=1e12).scales is None  # all as the layer


@pytest.mark.parametrize("name", ["gate", "up"])
def test_experts_have_moments_of_their_own(name: str, families: dict[str, Family], tmp_path: Path) -> None:
    mine = with_own(statistics(0), 0)
    assert mine.own_directions is not None and mine.own_values is not None and mine.own_sizes is not None
    found = build(families[name], saved(tmp_path, {0: mine, 1: statistics(1)}))  # layer 1: nothing that is its own
    plain = build(families[name], saved(tmp_path, {0: statistics(0), 1: statistics(1)}))
    assert found.scales is None and not found.shared and plain.own is None
    moments, whole = found.moment(slice(0, 6), D), plain.columns
    for number in range(6):
        factor = whole[number // EXPERTS]
        inner, size = torch.eye(D), torch.tensor(1.0)
        if number < EXPERTS:
            directions, size = mine.own_directions[number], mine.own_sizes[number]
            inner = inner + directions * mine.own_values[number] @ directions.T
        torch.testing.assert_close(moments[number], factor @ inner @ factor.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.rows[number], plain.rows[number] * size.sqrt())


def test_down_takes_none_of_them(families: dict[str, Family], tmp_path: Path) -> None:
    own = build(families["down"], saved(tmp_path, {k: with_own(statistics(k), k) for k in range(LAYERS)}))
    plain = build(families["down"], saved(tmp_path, {k: statistics(k) for k in range(LAYERS)}))
    assert own.own is None and all(map(torch.equal, own.rows, plain.rows))


def test_no_token_and_no_shrinkage(families: dict[str, Family], calibration: Calibration) -> None:
    found = build(families["gate"], calibration, metric_shrinkage=0.0)
    assert found.scales is not None and torch.equal(found.scales[2], torch.ones(D))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_an_expert_that_is_sent_nothing_is_weighed_as_the_others(
    name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    layers = {}
    for layer in range(LAYERS):
        mine = statistics(layer)
        for value in (mine.gate_rows, mine.up_rows, mine.hidden, mine.hidden_moment, mine.diagonal, mine.share):
            assert value is not None
            value[2] = 0
        layers[layer] = mine
    found = build(families[name], saved(tmp_path, layers))
    for row in found.rows:
        assert bool(row.isfinite().all()) and float(row.abs().max()) > 0
    assert float(found.rows[2].norm()) < 0.1 * float(found.rows[0].norm())


def test_inputs_of_zeros(families: dict[str, Family], tmp_path: Path) -> None:
    nothing = {k: replace(statistics(k), moment=torch.zeros(D, D), diagonal=torch.zeros(EXPERTS, D)) for k in (0, 1)}
    found = build(families["gate"], saved(tmp_path, nothing))
    assert torch.equal(found.columns[0], torch.eye(D)) and found.scales is None


def test_a_layer_that_is_not_there(families: dict[str, Family], tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match="no statistics of layer 1; calibrate this model"):
        build(families["gate"], saved(tmp_path, {0: statistics(0)}))


def test_damaged_statistics(families: dict[str, Family], tmp_path: Path) -> None:
    bad = statistics(1)
    bad.up_rows[0, 0] = torch.nan
    with pytest.raises(GlobeError, match=r"layers\.1\.up_rows is not finite; calibrate this model again"):
        build(families["gate"], saved(tmp_path, {0: statistics(0), 1: bad}))


@pytest.mark.parametrize("kind", ["none scaled", "scaled", "own", "rows", "mixed"])
def test_several_experts_are_seen_as_each_of_them_is(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    count, layers = 7, (0, 0, 1, 1, 1, None, 2)
    columns = {layer: torch.randn(D, D, generator=generator) for layer in (0, 1, 2)}
    scales = torch.rand(count, D, generator=generator) if kind == "scaled" else None
    full = torch.randn(count, P, P, generator=generator)
    rows: torch.Tensor | tuple[torch.Tensor, ...] = torch.rand(count, P, generator=generator)
    if kind == "rows":
        rows = full
    elif kind == "mixed":
        rows = (*rows[:3], *full[3:])
    own = None
    if kind == "own":
        directions = torch.linalg.qr(torch.randn(count, D, 3, generator=generator))[0]
        own = OwnColumns(directions, 4 * torch.rand(count, 3, generator=generator) - 0.9)
    metric = Metric(rows, columns, scales, layers, own=own)
    weights, moved = torch.randn(2, count, P, D, generator=generator)
    some = slice(1, 7)
    for name in ("seen", "unseen", "common", "weigh", "weigh_rows"):
        found = getattr(metric, name)(some, weights[some])
        one_by_one = [getattr(metric, name)(slice(k, k + 1), weights[k : k + 1]) for k in range(1, 7)]
        torch.testing.assert_close(found, torch.cat(one_by_one), msg=name)
    for number in range(count):
        one = slice(number, number + 1)
        layer = layers[number]
        factor = torch.eye(D) if layer is None else columns[layer]
        if scales is not None and layer is not None:
            factor = scales[number][:, None] * factor
        if own is not None and layer is not None:
            factor = factor @ dense_own(own, number).float()
        mine = rows[number]
        expected = (torch.diag(mine) if mine.ndim == 1 else mine) @ weights[number] @ factor
        torch.testing.assert_close(metric.weigh(one, weights[one])[0], expected, rtol=1e-4, atol=1e-4)
        inner = (metric.seen(one, weights[one]) * moved[one]).sum()
        torch.testing.assert_close((weights[one] * metric.unseen(one, moved[one])).sum(), inner, rtol=1e-3, atol=1e-3)
    whole = metric.moment(slice(0, count), D)
    seen = metric.unseen(slice(0, count), metric.seen(slice(0, count), weights))
    torch.testing.assert_close(weights @ whole, seen, rtol=1e-3, atol=1e-3)


def with_fisher(found: LayerStatistics, seed: int) -> LayerStatistics:
    """With 900 tokens of the first expert, none of the last."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.rand(2, EXPERTS, P, generator=generator) + 0.1
    squares[:, 2] = 0
    return replace(
        found,
        gate_fisher=squares[0],
        up_fisher=squares[1],
        output_fisher=moments(generator, 1, D)[0],
        fisher_counts=torch.tensor([900, 10, 0]),
    )


@pytest.mark.parametrize("name", ["gate", "up"])
def test_rows_by_the_loss(name: str, families: dict[str, Family], tmp_path: Path) -> None:
    layers = {layer: with_fisher(statistics(layer), layer) for layer in range(LAYERS)}
    found = build(families[name], saved(tmp_path, layers))
    mine = layers[1]
    squares, effect = getattr(mine, f"{name}_fisher"), getattr(mine, f"{name}_rows") * mine.share[:, None]
    effect = effect * squares.sum() / effect.sum()
    for expert, count in enumerate([900, 10, 0]):
        wanted = (count * squares[expert] + 64 * effect[expert]) / (count + 64)
        torch.testing.assert_close(found.rows[EXPERTS + expert].square(), wanted * 2.0 ** (-2 * found.exponent))
    residual = build(families[name], saved(tmp_path, layers), metric="residual")
    plain = build(families[name], saved(tmp_path, {layer: statistics(layer) for layer in range(LAYERS)}))
    assert all(torch.equal(*pair) for pair in zip(residual.rows, plain.rows, strict=True))


def test_down_by_the_loss_has_columns(families: dict[str, Family], tmp_path: Path) -> None:
    layers = {layer: with_fisher(statistics(layer), layer) for layer in range(LAYERS)}
    found = build(families["down"], saved(tmp_path, layers))
    assert found.layers == (0, 0, 0, 1, 1, 1) and found.scales is None and found.own is None
    output, hidden = layers[1].output_fisher, layers[1].hidden_moment
    assert output is not None and hidden is not None
    damped = output + 1e-3 * output.diagonal().mean() * torch.eye(D)
    torch.testing.assert_close(found.columns[1] @ found.columns[1].mT, damped, rtol=1e-4, atol=1e-5)
    rows, moment = found.rows[4], hidden[1] + 1e-3 * hidden[1].diagonal().mean() * torch.eye(P)
    torch.testing.assert_close(rows.mT @ rows, layers[1].share[1] * moment, rtol=1e-4, atol=1e-6)
