"""The experts of a layer, run as their own module runs them, and what their statistics are made of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from globe.compute.passes import engine
from globe.statistics.activations import Activation, Slopes, gated

FACTORS = 3  # of a token and expert, each as wide as the expert: see Seen
_ROWS = 256  # of a product on one core: what is made of them stays in its cache


def _chunks(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = both.chunk(2, dim=-1)
    return gate, up


@dataclass(frozen=True)
class Routing:
    """Pairs of a token and an expert that it is sent to, grouped by expert; there are n k of n tokens with k experts.

    Parameters
    ----------
    rows : torch.Tensor of int64, shape (n k,)
        The token of each pair.
    weights : torch.Tensor, shape (n k,)
        Its routing weight, in fp32.
    spans : tuple of slice
        The pairs of each expert.
    places : torch.Tensor of int64, shape (n, k)
        The pair that each of a token's choices became.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    spans: tuple[slice, ...]
    places: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """One call of a layer's experts.

    Parameters
    ----------
    inputs : torch.Tensor, shape (n, d)
    routing : Routing
    factors : torch.Tensor, shape (3, n k, p)
        Of every pair, with g = gate x and u = up x: ∂h/∂g, ∂h/∂u and h, in fp32; where h = φ(g) u these are φ'(g) u,
        φ(g) and φ(g) u. The next call overwrites them.
    """

    inputs: torch.Tensor
    routing: Routing
    factors: torch.Tensor


@dataclass(frozen=True)
class Form:
    """What experts are made of beside gate, up and down.

    Parameters
    ----------
    slopes : callable
        Of gate x and up x, (n, p) in fp32, ∂h/∂g, ∂h/∂u and h.
    halves : callable
        Gate x and up x in what both give together, along the last axis.
    biases : tuple of torch.Tensor or None
        (E, 2p) and (E, d), added to what gate and up give and to what down gives.
    finished : callable, optional
        What becomes of down's outputs before they are weighed.
    """

    slopes: Slopes
    halves: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = _chunks
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    finished: Callable[[torch.Tensor], torch.Tensor] | None = None


class Experts:
    """A layer's experts down_e h(gate_e x, up_e x), where h(g, u) is φ(g) ∘ u or what `form` says.

    On a CPU products are in the weights' dtype, summed in fp32, one block of tokens of one expert on a core, so that no
    bit depends on the number of threads; on other devices gate x and up x are products in fp32.

    Parameters
    ----------
    gate_up : torch.Tensor, shape (E, 2p, d)
        Every expert's gate above its up matrix; or rows in another order, or (E, p, d) without a gate, as `form` has
        it.
    down : torch.Tensor, shape (E, d, p)
        The down matrices.
    activation : callable, optional
        φ, elementwise.
    form : Form, optional
        In place of φ.
    """

    def __init__(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: Activation | None = None,
        form: Form | None = None,
    ) -> None:
        self.gate_up, self.down = gate_up, down
        if form is None:
            assert activation is not None
            form = Form(gated(activation, down.device))
        self.form = form
        self._factors = torch.empty(FACTORS, 0, down.shape[2], device=down.device)
        self._answers = torch.empty(0, down.shape[1], device=down.device)

    def run(self, inputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, Seen]:
        """The output Σ_e w_e down_e (φ(gate_e x) ∘ up_e x) for inputs x (n, d), in their dtype, and what was seen.

        `chosen` and `weights` (n, k) are each token's experts and its routing weights.
        """
        routing = route(chosen, weights, len(self.down))
        pairs = len(routing.rows)
        if pairs > len(self._answers):
            self._factors = torch.empty(FACTORS, pairs, self.down.shape[2], device=inputs.device)
            self._answers = torch.empty(pairs, self.down.shape[1], device=inputs.device)
        seen = Seen(inputs, routing, self._factors[:, :pairs])
        blocks = [
            (expert, rows)
            for expert, span in enumerate(routing.spans)
            for rows in row_blocks(span.start, span.stop, inputs.device)
        ]
        tokens = list(row_blocks(0, len(inputs), inputs.device))
        output = torch.empty_like(inputs)

        def answer(part: slice) -> None:
            for block in blocks[part]:
                self._answer(seen, *block)

        def sum_up(part: slice) -> None:
            for rows in tokens[part]:
                places = routing.places[rows]
                mine = self._answers.index_select(0, places.flatten()).view(*places.shape, -1)
                output[rows] = torch.bmm(weights[rows, None].float(), mine)[:, 0].to(output.dtype)

        with engine(inputs.device) as workers:
            workers.run(answer, len(blocks))
            workers.run(sum_up, len(tokens))
        return output, seen

    def _answer(self, seen: Seen, expert: int, rows: slice) -> None:
        """Keep the factors of some of an expert's pairs, and their outputs before the routing weights."""
        x, gate_up, down = seen.inputs.index_select(0, seen.routing.rows[rows]), self.gate_up[expert], self.down[expert]
        if x.device.type != "cpu":
            x, gate_up = x.float(), gate_up.float()
        shift, last = (None if each is None else each[expert] for each in self.form.biases)
        both = functional.linear(x.to(gate_up.dtype), gate_up).float()
        if shift is not None:
            both += shift.float()
        made = self.form.slopes(*self.form.halves(both))
        for factor, values in zip(seen.factors[:, rows], made, strict=True):
            factor.copy_(values)
        answer = functional.linear(made[2].to(down.dtype), down).float()
        if last is not None:
            answer += last.float()
        self._answers[rows] = answer if self.form.finished is None else self.form.finished(answer)


def route(chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> Routing:
    """Group a router's choices (n, k), with their weights (n, k), by expert."""
    flat = chosen.flatten().cpu()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=experts).cumsum(0).tolist()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    there = order.to(chosen.device)
    return Routing(
        rows=there // chosen.shape[1],
        weights=weights.flatten().float().index_select(0, there),
        spans=tuple(map(slice, [0, *ends[:-1]], ends)),
        places=places.view(chosen.shape).to(chosen.device),
    )


def row_blocks(first: int, last: int, device: torch.device) -> Iterator[slice]:
    """Rows first to last in blocks for a core of a CPU, or all of them for another device."""
    size = _ROWS if device.type == "cpu" else max(1, last - first)
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))
