"""A layer's experts in place of their module of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from globe.checkpoint.expert_module import expert_module
from globe.errors import GlobeError
from globe.statistics.activations import gated, own_slopes, ungated
from globe.statistics.called import called
from globe.statistics.experts import Experts, Form, Seen
from globe.statistics.layerwise import Layerwise

_PROBE = 16  # tokens on which the experts' products are compared with the module's own
_SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@contextmanager
def in_place_of(module: Any, experts: Experts, streamed: Layerwise) -> Iterator[list[Seen]]:
    """Run a layer's experts instead of their module, once they agree on its first tokens; what they see, by calls."""
    calls: list[Seen] = []
    agreed = False

    def forward(hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        nonlocal agreed
        call = called(module, len(experts.down), hidden_states, *routing)
        output, seen = experts.run(call.inputs, call.chosen, call.weights)
        if not agreed:
            own, mine = call.first(_PROBE).by(module), output[:_PROBE]
            distance = torch.linalg.norm((mine - own).float())
            same_finite = torch.equal(own.isfinite(), mine.isfinite())  # what is not finite, `Layerwise.run` tells
            if distance > _SAME[own.dtype] * torch.linalg.norm(own.float()) or not same_finite:
                raise _other_form(streamed, module)
            agreed = True
        calls.append(seen)
        return call.spread(output)

    module.forward = forward
    try:
        yield calls
    finally:
        del module.forward


def layer_experts(streamed: Layerwise, module: Any) -> Experts:
    """A layer's experts, of their module's parameters: views of them, not copies."""
    try:
        found = expert_module(module)
    except GlobeError:
        raise _other_form(streamed, module) from None
    gate_up, down = (found.turned(getattr(module, name).detach()) for name in (found.first, "down_proj"))
    if found.own_gating:
        slopes = own_slopes(found.hidden)
    else:
        slopes = (gated if found.gated else ungated)(module.act_fn, down.device)
    biases = found.bias("first"), found.bias("down")
    finished = found.finished if hasattr(module, "post_expert_norm") else None
    return Experts(gate_up, down, form=Form(slopes, found.halves if found.gated else _one, biases, finished))


def _one(up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return up, up


def _other_form(streamed: Layerwise, module: Any) -> GlobeError:
    return GlobeError(
        f"{streamed.checkpoint.directory}: {type(module).__name__} is not down h(gate x, up x), the form of expert "
        "that calibration knows; compress it without calibration (--calibrate none)"
    )
