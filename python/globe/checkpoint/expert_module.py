"""A module of transformers that holds the routed experts of a layer: where its matrices are, what it makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from globe.errors import GlobeError

_DOWN = "down_proj"
_FIRST = ("gate_up_proj", "up_proj")  # the second of experts without a gate


@dataclass(frozen=True)
class ExpertModule:
    """Experts down_e h(gate_e x, up_e x), of any architecture; of those without a gate h is of up_e x alone.

    Parameters
    ----------
    module : nn.Module
        Of transformers.
    first : str
        Its parameter of gate and up, ``gate_up_proj``, or of up alone, ``up_proj``.
    transposed : bool
        Whether parameters are (E, inputs, outputs) instead of (E, outputs, inputs).
    interleaved : bool
        Whether gate's outputs and up's alternate instead of following one another.
    """

    module: Any
    first: str
    transposed: bool
    interleaved: bool

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""
        return self.first == "gate_up_proj"

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, d and p."""
        count, rows, columns = getattr(self.module, _DOWN).shape
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def turned(self, matrices: torch.Tensor) -> torch.Tensor:
        """A view (E, outputs, inputs) of a parameter; or of that, the parameter."""
        return matrices.mT if self.transposed else matrices

    def bias(self, name: str) -> torch.Tensor | None:
        """The biases (E, outputs) of ``first`` or ``down``, if there are any."""
        found: torch.Tensor | None = getattr(self.module, f"{_DOWN if name == 'down' else self.first}_bias", None)
        return found

    def halves(self, both: torch.Tensor, axis: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of gate's part and up's along an axis."""
        if self.interleaved:
            gate, up = both.unflatten(axis, (-1, 2)).unbind(axis if axis < 0 else axis + 1)
            return gate, up
        gate, up = both.chunk(2, axis)
        return gate, up

    def joined(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gate's outputs and up's (n, p) as the module has them, (n, 2p)."""
        return torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)

    @property
    def own_gating(self) -> bool:
        """Whether h is the module's own and not φ(gate) · up."""
        own = getattr(type(self.module), "_apply_gate", None)
        return self.gated and own is not None and own.__name__ != "_default_apply_gate"

    def hidden(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """h of gate's outputs and up's."""
        if gate is None:
            found: torch.Tensor = self.module.act_fn(up)
        elif self.own_gating:
            found = self.module._apply_gate(self.joined(gate, up))
        else:
            found = self.module.act_fn(gate) * up
        return found

    def finished(self, outputs: torch.Tensor) -> torch.Tensor:
        """What becomes of down's outputs before they are weighed."""
        norm = getattr(self.module, "post_expert_norm", None)
        if norm is not None:
            outputs = norm(outputs)
        return outputs


def expert_module(module: Any) -> ExpertModule:
    """How a module holds its experts.

    Raises
    ------
    GlobeError
        If it is made in another way than all supported architectures' are.
    """
    shapes = {name: tuple(value.shape) for name, value in module._parameters.items() if value is not None}
    found = _by_shapes(module, shapes)
    if found is None:
        raise GlobeError(
            f"{type(module).__name__} of transformers is not made of gate_up_proj or up_proj, and down_proj"
        )
    if not found.own_gating and not hasattr(module, "act_fn"):
        raise GlobeError(f"{type(module).__name__} of transformers has neither act_fn nor a gating of its own")
    return found


def _by_shapes(module: Any, shapes: dict[str, tuple[int, ...]]) -> ExpertModule | None:
    """Which way its parameters lie. None lie both ways, but without a gate, where the module says it."""
    first = next((name for name in _FIRST if name in shapes), "")
    outer, inner = shapes.pop(first, ()), shapes.pop(_DOWN, ())
    if len(outer) != 3 or len(inner) != 3:
        return None
    each = 2 if first == _FIRST[0] else 1
    ways = {False: outer[1:] == (each * inner[2], inner[1]), True: outer[1:] == (inner[2], each * inner[1])}
    said = bool(getattr(module, "is_transposed", False))
    turned = next((way for way in (said, not said) if ways[way]), None)
    if turned is None:
        return None
    outputs = {first: outer[2] if turned else outer[1], _DOWN: inner[2] if turned else inner[1]}
    biases = {f"{name}_bias": (outer[0], size) for name, size in outputs.items()}
    if any(biases.get(name) != shape for name, shape in shapes.items()):
        return None
    return ExpertModule(module, first, turned, not getattr(module, "is_concatenated", True))
