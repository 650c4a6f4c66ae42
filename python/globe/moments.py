"""Second moments of a mixture of experts, gathered while a decoder layer runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from globe.calibration import LayerStatistics

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
        self.residual = 0.0
        self.moment = _zeros(d, d)
        self.weight = _zeros(experts)
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.diagonal = _zeros(experts, d)
        self.squares = _zeros(3, experts, p)  # of the gate's and the up matrix's factors, and of down's input
        self.products = _zeros(3, experts, p, p) if full else None

    def add_residual(self, stream: torch.Tensor) -> None:
        """Take the residual stream of some tokens behind the block, shape (..., d)."""
        self.residual += float(stream.float().square().sum(-1).cpu().double().reciprocal().sum())

    def add(self, inputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Take the block's input x (n, d) with each token's experts and routing weights (n, k).

        Returns
        -------
        torch.Tensor, shape (n, d)
            The experts' output Σ_e w_e down_e (φ(gate_e x) · up_e x), in the inputs' dtype.
        """
        x, routing = inputs.float(), weights.float()
        self.tokens += len(x)
        self.moment += _double(x.T @ x)
        output = torch.zeros_like(x)
        for expert in range(len(self.down)):
            rows, places = torch.where(chosen == expert)
            if len(rows) == 0:
                continue
            mine, w = x[rows], routing[rows, places, None]
            gate, up = functional.linear(mine, self.gate_up[expert].float()).chunk(2, dim=-1)
            phi, slope = value_and_slope(self.activation, gate)
            hidden = phi * up
            output.index_add_(0, rows, functional.linear(hidden, self.down[expert].float()) * w)
            self.counts[expert] += len(rows)
            self.weight[expert] += _double(w).square().sum()
            self.diagonal[expert] += _double((w * mine).square().sum(0))
            for number, factor in enumerate((slope * up, phi, hidden)):
                scaled = factor * w
                self.squares[number, expert] += _double(scaled.square().sum(0))
                if self.products is not None:
                    self.products[number, expert] += _double(scaled.T @ scaled)
        return output.to(inputs.dtype)

    def statistics(self) -> LayerStatistics:
        """The means over the tokens taken."""
        down = self.down.float().cpu().double()
        scale = torch.where(self.weight > 0, 1 / self.weight, 0)[:, None]
        gate, up, hidden = self.squares * scale
        norms = down.square().sum(1)
        full = {}
        if self.products is not None:
            gram = down.mT @ down
            moments = (self.products + self.products.mT) / 2 * scale[:, :, None]
            found = {"gate_moment": moments[0] * gram, "up_moment": moments[1] * gram, "hidden_moment": moments[2]}
            full = {name: value.float() for name, value in found.items()}
        return LayerStatistics(
            moment=((self.moment + self.moment.T) / (2 * self.tokens)).float(),
            residual=torch.tensor(self.tokens / self.residual, dtype=torch.float32),
            share=(self.weight / self.tokens).float(),
            counts=self.counts,
            diagonal=(self.diagonal * scale).float(),
            gate_rows=(gate * norms).float(),
            up_rows=(up * norms).float(),
            hidden=hidden.float(),
            **full,
        )


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
