"""Moments of the experts' own inputs: how they are summed, shrunk towards their layer's, and cut to few directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_mps import MPS, FakeMps
from globe.checkpoint.index import Checkpoint
from globe.sizes.own import own_directions
from globe.statistics import memory
from globe.statistics.calibration import save_calibration
from globe.statistics.experts import Experts
from globe.statistics.manner import OwnPlan
from globe.statistics.moments import Moments
from globe.statistics.own_columns import OwnColumns
from globe.statistics.shrinkage import DAMPING, Own, Whitened, believed, damped_factor, leading

D = 24
EVERY = 128  # tokens of a stretch


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double() / len(inputs)


def halves_of(inputs: torch.Tensor) -> torch.Tensor:
    return torch.stack([moment_of(half) for half in inputs.chunk(2)])


def dense(moment: torch.Tensor, own: Own) -> torch.Tensor:
    """c L R Rᵀ Lᵀ."""
    columns = OwnColumns(own.directions[None], own.values[None])
    seen = columns.times(slice(0, 1), damped_factor(moment)[None])[0].double()
    return own.size * seen @ seen.T


def whitened(moment: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """E of an expert's moment in its layer's coordinates."""
    damping = DAMPING * moment.diagonal().mean() * torch.eye(D)
    inverse = torch.linalg.inv(torch.linalg.cholesky(moment + damping))
    size = (inverse @ own @ inverse.T).trace() / (inverse @ moment @ inverse.T).trace()
    return inverse @ (own / size + damping) @ inverse.T - torch.eye(D)


@pytest.fixture(scope="module")
def layer() -> torch.Tensor:
    return moment_of(draw(0, 40_000, D) @ draw(1, D, D))


def test_with_all_directions_the_moment_is_the_shrunk_one(layer: torch.Tensor) -> None:
    inputs = 3 * draw(2, 2_000, D) @ draw(1, D, D) * torch.linspace(0.2, 3, D)
    halves, weights = halves_of(inputs), torch.tensor([1.0, 1.0], dtype=torch.float64)
    own = Whitened(layer).own(halves, weights, 2_000, D)
    assert own is not None
    first, second, both = (whitened(layer, moment) for moment in (*halves, halves.mean(0)))
    theta = believed(first, second, 2_000)
    assert 0.8 < theta < 0.99
    factor = damped_factor(layer).double()
    wanted = own.size * factor @ (torch.eye(D) + theta * both) @ factor.T
    torch.testing.assert_close(dense(layer, own), wanted, rtol=1e-3, atol=1e-3 * float(wanted.diagonal().mean()))
    trace = torch.cholesky_solve(halves.mean(0), factor).trace() / torch.cholesky_solve(layer, factor).trace()
    assert own.size == pytest.approx(float(trace), rel=1e-3)


def test_few_directions_are_those_that_a_likelihood_asks_for() -> None:
    values = torch.cat([torch.tensor([0.02, 0.3, 40.0, 3.0]), torch.linspace(0.9, 1.1, D - 4)])
    basis = torch.linalg.qr(draw(3, D, D))[0]
    directions, found = leading(basis @ values.diag() @ basis.T, 3)
    order = found.argsort()
    torch.testing.assert_close(found[order], torch.tensor([0.02, 0.3, 40.0]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((directions.T @ basis[:, :3]).abs()[order], torch.eye(3), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3), rtol=1e-4, atol=1e-4)


def beyond(layer: torch.Tensor, inputs: torch.Tensor) -> float:
    """θ of an expert with these inputs."""
    return believed(*(whitened(layer, moment) for moment in halves_of(inputs)), len(inputs))


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_how_much_is_believed(seed: int, layer: torch.Tensor) -> None:
    mixing = draw(1, D, D)
    assert beyond(layer, draw(seed, 8_000, D) @ mixing) < 0.4  # as the layer: 276 numbers that agree by chance
    different = draw(seed, 8_000, D) * torch.linspace(0.3, 2, D) @ mixing
    assert 0.9 < beyond(layer, different) < 1
    assert 0.1 < beyond(layer, different[:100]) < 0.81


def test_no_more_is_believed_than_tokens_can_tell(layer: torch.Tensor) -> None:
    alike = draw(7, 1, D).repeat(6, 1)
    assert beyond(layer, alike) == pytest.approx(6 / (6 + D))


@pytest.mark.parametrize("weights", [[0.0, 2.0], [0.0, 0.0]])
def test_half_of_the_tokens_tell_nothing(weights: list[float], layer: torch.Tensor) -> None:
    means = halves_of(draw(8, 500, D)) * torch.tensor(weights).bool()[:, None, None]
    assert Whitened(layer).own(means, torch.tensor(weights), 500, 4) is None


def test_inputs_of_zeros() -> None:
    nothing = torch.zeros(D, D, dtype=torch.float64)
    assert Whitened(nothing).own(torch.zeros(2, D, D), torch.ones(2), 500, 4) is None


def made(experts: int) -> Experts:
    gate_up, down = draw(9, experts, 6, D), draw(10, experts, D, 3)
    return Experts(gate_up, down, torch.nn.functional.silu)


TOKENS = 16 * EVERY


def sorted_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and the two experts out of four that each goes to: by its sign, and by chance; the last gets none."""
    x = draw(11, TOKENS, D)
    own = (x[:, 0] > 0).long()
    x[:, 1:9] *= torch.where(own > 0, 3.0, 0.3)[:, None]
    return x, torch.stack([own, torch.full_like(own, 2)], 1)


def gathered(x: torch.Tensor, chosen: torch.Tensor, spans: list[slice], own: int = 8) -> Moments:
    experts, moments = made(4), Moments(4, D, 3, (), own)
    for span in spans:
        weights = torch.full(chosen[span].shape, 0.5)
        seen = experts.run(x[span], chosen[span], weights)[1]
        moments.add(seen, torch.ones(span.stop - span.start, D), span.start)
    return moments


def test_an_expert_is_given_its_own_moment_or_its_layers() -> None:
    x, chosen = sorted_tokens()
    found = gathered(x, chosen, [slice(0, 900), slice(900, TOKENS)]).statistics(made(4).down)
    assert found.own_directions is not None and found.own_values is not None and found.own_sizes is not None
    assert found.own_directions.shape == (4, D, 8) and found.own_values.shape == (4, 8)
    assert found.own_values.any(1).tolist() == [True, True, bool(found.own_values[2].any()), False]
    assert found.own_sizes[3] == 1
    for expert in (0, 1):
        own = Own(found.own_directions[expert], found.own_values[expert], float(found.own_sizes[expert]))
        moment = dense(found.moment, own)
        wanted = moment_of(x[chosen[:, 0] == expert])
        common = found.moment.double()
        assert (moment - wanted).norm() < 0.3 * (common - wanted).norm()
    assert float(found.own_values[2].abs().max()) < 0.2  # it is given all tokens


def test_sums_merge() -> None:
    x, chosen = sorted_tokens()
    spans = [slice(k, k + 256) for k in range(0, TOKENS, 256)]
    whole, merged = gathered(x, chosen, spans), gathered(x, chosen, spans[::2])
    merged.merge(gathered(x, chosen, spans[1::2]))
    assert whole.own.totals is not None and merged.own.totals is not None
    torch.testing.assert_close(merged.own.totals, whole.own.totals, rtol=1e-5, atol=1e-4)
    none = gathered(x, chosen, [], own=8)
    none.merge(whole)
    assert none.own.totals is not None and torch.equal(none.own.totals, whole.own.totals)
    with pytest.raises(ValueError, match=r"other: found sums of .*; expected .*, as here"):
        whole.merge(gathered(x, chosen, spans, own=4))


def test_nothing_is_gathered_where_every_token_goes_to_all_experts() -> None:
    x, everywhere = sorted_tokens()[0], torch.arange(4).repeat(TOKENS, 1)
    for moments in (gathered(x, everywhere, [slice(0, TOKENS)]), gathered(*sorted_tokens(), [slice(0, TOKENS)], own=0)):
        assert moments.own.totals is None and moments.statistics(made(4).down).own_values is None


def test_files_with_and_without(tmp_path: Path) -> None:
    x, chosen = sorted_tokens()
    layers = {
        number: gathered(x, chosen, [slice(0, TOKENS)], own).statistics(made(4).down)
        for number, own in ((0, 8), (1, 0))
    }
    found = save_calibration(tmp_path / "statistics", layers, {})
    for name in ("own_directions", "own_values", "own_sizes"):
        mine = getattr(layers[0], name)
        assert mine is not None and torch.equal(getattr(found.layer(0), name), mine)
        assert getattr(found.layer(1), name) is None and not found.has(name)


def test_sums_do_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gathered(*sorted_tokens(), [slice(0, TOKENS)]).own.totals)
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def test_sums_take_only_what_mps_has() -> None:
    x, chosen = sorted_tokens()
    found: list[Any] = []
    for place in (MPS, torch.device("cpu")):
        with FakeMps():
            cpu = made(4)
            experts = Experts(cpu.gate_up.to(place), cpu.down.to(place), torch.nn.functional.silu)
            moments = Moments(4, D, 3, (), 8)
            weights = torch.ones(chosen.shape)
            moments.add(experts.run(x.to(place), chosen.to(place), weights.to(place))[1], x, 0)
            found.append(moments.statistics(experts.down).own_values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_room_for_directions() -> None:
    assert own_directions(16, 40) == 40 and own_directions(120, 576) == 64
    assert own_directions(4096, 4096) == 16 and own_directions(58 * 256, 7168) == 0


def test_where_they_are_gathered(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, cpu = Checkpoint(tiny("olmoe")), torch.device("cpu")
    without, needed = memory.calibration_bytes(source, 640), memory.calibration_bytes(source, 640, 0, 64)
    gates = source.family("gate")
    each = len(gates) // gates.layers
    assert needed - without >= 8 * each * gates.d**2 + 4 * len(gates) * gates.d * 64
    assert memory.own_plan(source, 640, 0, needed, cpu) == OwnPlan(64)
    short = memory.own_plan(source, 640, 0, needed - 1, cpu)
    assert short.directions == 0 and short.why_not is not None and "of memory, and" in short.why_not
    monkeypatch.setattr(memory, "device_room", lambda device: 16 * each * gates.d**2 - 2)
    there = memory.own_plan(source, 640, 0, needed, torch.device("cuda:0"))
    assert there.directions == 0 and "on cuda:0, which has" in str(there.why_not)
    source.config["num_experts_per_tok"] = each
    assert memory.own_plan(source, 640, 0, needed, cpu) == OwnPlan(0, "every token goes to all experts of its layer")
