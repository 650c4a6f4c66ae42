"""A layer's experts and the sums of their statistics, without a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from globe.statistics.calibration import MOMENTS, LayerStatistics
from globe.statistics.experts import Experts
from globe.statistics.grams import mirrored, upper_gram
from globe.statistics.moments import Moments

SILU = torch.nn.functional.silu


def made(experts: int = 2, d: int = 4, p: int = 3) -> Experts:
    random = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=random) for shape in ((experts, 2 * p, d), (experts, d, p)))
    return Experts(gate_up, down, SILU)


def moments_of(experts: Experts, kept: tuple[str, ...] = MOMENTS) -> Moments:
    count, d, p = experts.down.shape
    return Moments(count, d, p, kept)


def routed(tokens: int, experts: int, choices: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=random).topk(choices).indices
    return chosen, torch.rand(tokens, choices, generator=random)


def fields(statistics: LayerStatistics) -> dict[str, Any]:
    return {name: value for name, value in asdict(statistics).items() if value is not None}


@pytest.mark.parametrize("tokens", [1, 700])
def test_experts_give_what_the_formula_says(tokens: int) -> None:
    experts = made(6, 16, 12)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))
    chosen, weights = routed(tokens, 6, 2, 2)
    output, seen = experts.run(x, chosen, weights)
    wanted = torch.zeros(tokens, 16, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(chosen[token].tolist(), weights[token].double(), strict=True):
            gate, up = (experts.gate_up[expert].double() @ x[token].double()).chunk(2)
            wanted[token] += weight * (experts.down[expert].double() @ (SILU(gate) * up))
    torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-4)
    assert [span.stop - span.start for span in seen.routing.spans] == chosen.flatten().bincount(minlength=6).tolist()


def test_output_and_sums_do_not_depend_on_threads() -> None:
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    chosen, weights = routed(3000, 5, 3, 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            experts = made(5, 64, 48)
            output, seen = experts.run(x, chosen, weights)
            moments = moments_of(experts)
            moments.add(seen, x, 0)
            found.append([output, moments.squares, moments.diagonals, *moments.products.values()])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_two_halves_of_the_windows_merge_to_the_whole() -> None:
    experts, window = made(3, 16, 12), 100
    x = torch.randn(8 * window, 16, generator=torch.Generator().manual_seed(1))
    chosen, weights = routed(len(x), 3, 2, 2)

    def summed(windows: list[int]) -> Moments:
        moments = moments_of(experts)
        for number in windows:
            rows = slice(number * window, (number + 1) * window)
            moments.add(experts.run(x[rows], chosen[rows], weights[rows])[1], 2 * x[rows], rows.start)
        return moments

    whole, merged = summed(list(range(8))), summed([0, 3, 5, 6])
    merged.merge(summed([1, 2, 4, 7]))
    found, wanted = (fields(moments.statistics(experts.down)) for moments in (merged, whole))
    assert found.keys() == wanted.keys() and merged.tokens == whole.tokens == len(x)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_sums_of_another_shape_are_not_merged() -> None:
    experts = made()
    with pytest.raises(ValueError, match=r"other: found sums of .*; expected .*, as here"):
        moments_of(experts).merge(moments_of(experts, ()))


def test_an_expert_that_is_sent_nothing() -> None:
    experts = made()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    moments = moments_of(experts)
    moments.add(experts.run(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))[1], x, 0)
    statistics: Any = moments.statistics(experts.down)
    assert statistics.counts.tolist() == [5, 0]
    assert all(value[1].eq(0).all() for value in (statistics.hidden, statistics.gate_moment))
    torch.testing.assert_close(statistics.diagonal[1], statistics.moment.diagonal())


def test_an_experts_own_inputs_are_believed_where_halves_of_them_agree() -> None:
    experts = made()
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(4000)[:, None] % 2
    x[chosen[:, 0] == 0] *= torch.tensor([3.0, 1.0, 1.0, 1.0])  # expert 0 differs, always in the same way
    x[0] *= 100
    moments = moments_of(experts, ())
    moments.add(experts.run(x, chosen, torch.ones(4000, 1))[1], torch.ones(4000, 4), 0)
    statistics = moments.statistics(experts.down)
    own = x[chosen[:, 0] == 1].square().mean(0)
    torch.testing.assert_close(statistics.diagonal[1], own, rtol=1e-4, atol=1e-4)  # half of its inputs tell the others'
    assert not torch.allclose(own, statistics.moment.diagonal(), rtol=0.1)
    torch.testing.assert_close(statistics.diagonal[0], statistics.moment.diagonal())  # one token makes half of them


def test_moments_take_only_what_mps_has() -> None:
    from fake_mps import MPS, FakeMps

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    chosen, weights = torch.tensor([[0], [1], [1], [0], [1]]), torch.rand(5, 1)
    found = []
    for place in (MPS, torch.device("cpu")):
        with FakeMps():
            cpu = made()
            experts = Experts(cpu.gate_up.to(place), cpu.down.to(place), SILU)
            output, seen = experts.run(x.to(place), chosen.to(place), weights.to(place))
            moments = moments_of(experts)
            moments.add(seen, x, 0)
            found.append({**fields(moments.statistics(experts.down)), "output": output.cpu()})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, msg=name)


@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (30, 65), (50, 257), (5, 600)])
def test_symmetric_products(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mirrored(upper_gram(x)), x.T @ x, rtol=1e-5, atol=1e-5)
