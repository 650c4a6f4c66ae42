"""Activations φ with their slopes φ': in closed form where φ is a known one, by automatic differentiation otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]
Sloped = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Slopes = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

_FAR = (-1000.0, -200.0, -50.0, -20.0, 20.0, 50.0, 200.0, 1000.0)  # where a clipped activation differs
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def sloped(activation: Activation, device: torch.device) -> Sloped:
    """The function x ↦ (φ(x), φ'(x)) of an elementwise activation.

    Parameters
    ----------
    activation : callable
        φ. It is taken for a known one if it agrees with it to rounding at 249 points between −1000 and 1000, whatever
        its class is called.
    device : torch.device
        Where it can be called.

    Returns
    -------
    callable
        Of a tensor in fp32, not written to. At a kink of a known φ the slope is that of automatic differentiation.
    """
    name = name_of(activation, device)
    return (lambda x: differentiated(activation, x)) if name is None else KNOWN[name]


def name_of(activation: Activation, device: torch.device) -> str | None:
    """Which of the known an activation is, as :func:`sloped` tells; None for another."""
    at = torch.cat([torch.linspace(-12, 12, 241), torch.tensor(_FAR)])[None]
    with torch.no_grad():
        found = activation(at.to(device)).cpu()
    alike = (name for name, known in KNOWN.items() if torch.allclose(known(at)[0], found, rtol=1e-5, atol=1e-6))
    return next(alike, None)


def differentiated(activation: Activation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(x) and φ'(x) by automatic differentiation."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = activation(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def gated(activation: Activation, device: torch.device) -> Slopes:
    """The function (g, u) ↦ (φ'(g) u, φ(g), φ(g) u)."""
    known = sloped(activation, device)

    def slopes(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, slope = known(gate)
        return slope.mul_(up), value, value * up

    return slopes


def ungated(activation: Activation, device: torch.device) -> Slopes:
    """The function (_, u) ↦ (0, φ'(u), φ(u)), of experts without a gate."""
    known = sloped(activation, device)

    def slopes(_: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, slope = known(up)
        return torch.zeros_like(up), slope, value

    return slopes


def own_slopes(gating: Gating) -> Slopes:
    """The function (g, u) ↦ (∂h/∂g, ∂h/∂u, h) of any elementwise h, by automatic differentiation."""

    def slopes(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            value = gating(*leaves)
            by_gate, by_up = torch.autograd.grad(value.sum(), leaves)
        return by_gate, by_up, value.detach()

    return slopes


def _silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate = torch.sigmoid(x)
    value = x * gate
    return value, (1 - gate).mul_(value).add_(gate)


def _quick_gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate = torch.sigmoid(1.702 * x)
    value = x * gate
    return value, (1 - gate).mul_(value).mul_(1.702).add_(gate)


def _gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    below = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    density = torch.exp(x.square().mul_(-0.5)).mul_(1 / math.sqrt(2 * math.pi))
    return x * below, density.mul_(x).add_(below)


def _gelu_tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = x.square()
    bend = torch.tanh((square * _TANH_CUBE).add_(1).mul_(x).mul_(_TANH_SCALE))
    inner = square.mul_(3 * _TANH_CUBE).add_(1).mul_(_TANH_SCALE)
    half = (bend + 1).mul_(0.5)
    return x * half, (1 - bend.square_()).mul_(inner).mul_(x).mul_(0.5).add_(half)


def _relu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu_squared(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positive = torch.relu(x)
    return positive.square(), 2 * positive


KNOWN: dict[str, Sloped] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu_squared,
}
