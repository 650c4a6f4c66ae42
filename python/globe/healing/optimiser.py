"""What turns gradients into steps: momentum with orthogonal matrices (Muon) for matrices, Adam for vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from globe.healing.parts import Moving

MOMENTUM, BETAS = 0.9, (0.9, 0.95)
_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Muon: singular values between 0.7 and 1.2 after five steps
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose matrices are made orthogonal, for parameters of matrices (..., p, r), in fp32.

    An entry of an update has a root mean square of about the group's `lr`. torch's own takes single matrices, and
    computes in bf16, which a CPU without bf16 products has at a tenth of the speed.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = MOMENTUM) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kept = self.state[parameter]
                    if "momentum" not in kept:
                        kept["momentum"] = torch.zeros_like(parameter)
                    average = kept["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    update = orthogonal(parameter.grad.lerp(average, group["momentum"]))
                    parameter.add_(update, alpha=-group["lr"] * max(update.shape[-2:]) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of each matrix U S Vᵀ of a tensor (..., p, r), by five Newton-Schulz steps; 0 stays 0."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-30)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimisers(parts: list[Moving], rate: float) -> list[torch.optim.Optimizer]:
    """An optimiser for matrices and one for vectors, as far as there are such; `rate` is over a tensor's own RMS."""
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for each in parts:
        size = float(each.parameter.detach().square().mean().sqrt())
        groups[each.parameter.ndim > 1].append({"params": [each.parameter], "lr": rate * size})
    matrices = [Muon(groups[True])] if groups[True] else []
    return [*matrices, *([torch.optim.Adam(groups[False], betas=BETAS)] if groups[False] else [])]
