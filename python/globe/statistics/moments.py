"""Second moments of a mixture of experts, gathered while a decoder layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from globe.statistics.calibration import LayerStatistics

_STRETCH = 128  # tokens
Activation = Callable[[torch.Tensor], torch.Tensor]


class Moments:
    """Sums of a layer's statistics over tokens: products in fp32 over the tokens of one call, sums of calls in fp64.

    Parameters
    ----------
    gate_up : torch.Tensor, shape (E, 2p, d)
        Every expert's gate above its up matrix.
    down : torch.Tensor, shape (E, d, p)
        The down matrices.
    activation : callable
        φ, elementwise.
    full : bool
        Whether the p × p moments are gathered too.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: Activation, *, full: bool) -> None:
        self.gate_up, self.down, self.activation = gate_up, down, activation
        experts, d, p = down.shape
        self.tokens = 0
        self.worth = 0.0
        self.moment = _zeros(d, d)
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.halves = _zeros(2, experts)  # weights of the tokens, of every other stretch apart
        self.diagonals = _zeros(2, experts, d)
        self.squares = _zeros(3, experts, p)  # of the gate's and the up matrix's factors, and of down's input
        self.products = _zeros(3, experts, p, p) if full else None

    def output(self, inputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' output Σ_e w_e down_e (φ(gate_e x) · up_e x) for inputs x (n, d), in their dtype.

        `chosen` and `weights` (n, k) are each token's experts and its routing weights.
        """
        total = torch.zeros_like(inputs, dtype=torch.float32)
        for expert, rows, mine, w in self._tokens(inputs.float(), chosen, weights.float()):
            phi, _, up = self._products(expert, mine)
            total.index_add_(0, rows, functional.linear(phi * up, self.down[expert].float()) * w)
        return total.to(inputs.dtype)

    def add(self, inputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stream: torch.Tensor) -> None:
        """Take the block's input x (n, d), what `output` takes with it, and the residual stream behind it (n, d)."""
        x = inputs.float()
        size = stream.to(x.device).float().square().sum(-1, keepdim=True)
        worth = torch.where(size > 0, 1 / size, 0)
        second = torch.arange(self.tokens, self.tokens + len(x), device=x.device) // _STRETCH % 2 == 1
        self.tokens += len(x)
        self.worth += float(_double(worth).sum())
        self.moment += _double(x.T @ (worth * x))
        for expert, rows, mine, w in self._tokens(x, chosen, weights.float()):
            w = w * worth[rows].sqrt()
            phi, slope, up = self._products(expert, mine)
            self.counts[expert] += len(rows)
            for half, some in enumerate((~second[rows], second[rows])):
                self.halves[half, expert] += _double(w[some]).square().sum()
                self.diagonals[half, expert] += _double((w[some] * mine[some]).square().sum(0))
            for number, factor in enumerate((slope * up, phi, phi * up)):
                scaled = factor * w
                self.squares[number, expert] += _double(scaled.square().sum(0))
                if self.products is not None:
                    self.products[number, expert] += _double(scaled.T @ scaled)

    def _tokens(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Every expert that is sent tokens: which, their inputs (n, d) and routing weights (n, 1)."""
        for expert in range(len(self.down)):
            rows, places = torch.where(chosen == expert)
            if len(rows) > 0:
                yield expert, rows, x[rows], weights[rows, places, None]

    def _products(self, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """φ(gate x), φ'(gate x) and up x."""
        gate, up = functional.linear(x, self.gate_up[expert].float()).chunk(2, dim=-1)
        return *value_and_slope(self.activation, gate), up

    def statistics(self) -> LayerStatistics:
        """The means over the tokens taken."""
        down = self.down.float().cpu().double()
        weight = self.halves.sum(0)
        scale = torch.where(weight > 0, 1 / weight, 0)[:, None]
        gate, up, hidden = self.squares * scale
        norms = down.square().sum(1)
        full = {}
        if self.products is not None:
            gram = down.mT @ down
            moments = (self.products + self.products.mT) / 2 * scale[:, :, None]
            found = {"gate_moment": moments[0] * gram, "up_moment": moments[1] * gram, "hidden_moment": moments[2]}
            full = {name: value.float() for name, value in found.items()}
        moment = (self.moment + self.moment.T) / (2 * self.worth)
        return LayerStatistics(
            moment=moment.float(),
            residual=torch.tensor(self.tokens / self.worth, dtype=torch.float32),
            share=(weight / self.worth).float(),
            counts=self.counts,
            diagonal=self._own_diagonals(moment.diagonal()).float(),
            gate_rows=(gate * norms).float(),
            up_rows=(up * norms).float(),
            hidden=hidden.float(),
            **full,
        )

    def _own_diagonals(self, common: torch.Tensor) -> torch.Tensor:
        """E[x∘x] of every expert's tokens; `common` where half of the tokens tell less of the other half than it."""
        means = torch.where(self.halves > 0, 1 / self.halves, 0)[..., None] * self.diagonals
        weights = torch.where(common > 0, 1 / common, 0)
        apart = ((means[0] - means[1]) * weights).square().sum(1)
        away = ((means - common) * weights).square().sum(2).mean(0)
        believed = (self.halves > 0).all(0) & (apart < away)
        whole = self.diagonals.sum(0) / self.halves.sum(0)[:, None]
        return torch.where(believed[:, None], whole, common)


def value_and_slope(activation: Activation, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """φ and φ' of an elementwise activation."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = activation(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().double()
