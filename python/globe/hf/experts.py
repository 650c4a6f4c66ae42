"""The routed experts of a layer, held as left factors: y = (x B̃ᵀ) Aᵀ in place of y = x Wᵀ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from globe.checkpoint.formats.packed import PACKED, SCALE, Packing
from globe.errors import GlobeError
from globe.hf.banks import AsStored, Bank, Banks, register_packed, require_packed, unpacked

FAMILIES = ("gate", "up", "down")
_NONE: Mapping[str, Packing] = MappingProxyType({})
Held = dict[str, tuple[torch.Tensor, ...]]  # parameters by name, expert by expert


@dataclass(frozen=True)
class Place:
    """Where the experts of a layer are in a bank: expert e has row `first + step · e` of its codes."""

    bank: Bank
    first: int
    step: int = 1

    def row(self, expert: int) -> int:
        """The row of an expert's codes."""
        return self.first + self.step * expert


class FactoredExperts(AsStored):
    """Stands in for an experts module of transformers, of whatever architecture, and is called as it is.

    A factored family has parameter `{family}_left` (E, p, r), the left factors; one that is not is dense: `gate_dense`
    and `up_dense` (E, p, d), or `gate_up_proj` (E, 2p, d) where neither is factored, and `down_proj` (E, d, p). Packed
    left factors are buffers `{family}_left_packed` and so on, and each is made values of each time it is used.

    Parameters
    ----------
    dense : nn.Module
        The module of transformers.
    places : dict
        The factored families.
    banks : Banks
        Shared by all layers.
    packings : mapping
        Of the families whose left factors are packed.
    """

    act_fn: Any

    def __init__(
        self, dense: nn.Module, places: dict[str, Place], banks: Banks, packings: Mapping[str, Packing] = _NONE
    ) -> None:
        super().__init__()
        gate_up, down = check_experts(dense)
        experts, width, size = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, size, width
        self.act_fn = dense.act_fn
        self.places, self.packings = places, packings
        self._banks = (banks,)  # in a tuple, so that it is no submodule of every layer
        if "gate" not in places and "up" not in places:
            self.gate_up_proj = gate_up
        if "down" not in places:
            self.down_proj = down
        for family in FAMILIES:
            if family in places:
                rank = places[family].bank.rank
                packing = packings.get(family)
                if packing is not None:
                    words, groups = (experts, width, packing.words(rank)), (experts, width, rank // packing.group)
                    register_packed(self, f"{family}_left", words, groups)
                    places[family].bank.orthonormal = True
                    continue
                self.register_parameter(f"{family}_left", nn.Parameter(gate_up.new_empty(experts, width, rank)))
            elif family != "down" and "gate_up_proj" not in self._parameters:
                self.register_parameter(f"{family}_dense", nn.Parameter(gate_up.new_empty(experts, width, size)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Σ_k weight_tk · expert_{index_tk}(x_t), the tokens grouped by expert; index E stands for none.

        Parameters are taken apart once, and rows by `index_select`: their gradients then are one stack of the experts'
        and sums of rows, and not a tensor of all experts for each.
        """
        held = {name: getattr(self, name).unbind() for name in self._parameters}
        total = torch.zeros_like(hidden_states)
        picked = top_k_index.reshape(-1)
        order = picked.argsort(stable=True)
        tokens = order // top_k_index.shape[-1]
        weights = top_k_weights.reshape(-1).index_select(0, order)[:, None]
        last = 0
        for expert, count in enumerate(torch.bincount(picked, minlength=self.num_experts)[: self.num_experts].tolist()):
            if count:
                span = slice(last, last + count)
                rows = tokens[span]
                made = self._expert(expert, held, hidden_states.index_select(0, rows)) * weights[span]
                total.index_add_(0, rows, made.to(total.dtype))
                last += count
        return total

    def _expert(self, expert: int, held: Held, x: torch.Tensor) -> torch.Tensor:
        if "gate_up_proj" in held:
            gate, up = linear(x, held["gate_up_proj"][expert]).chunk(2, -1)
        else:
            gate, up = (self._rows(family, expert, held, x) for family in ("gate", "up"))
        hidden: torch.Tensor = self.act_fn(gate) * up
        if "down_proj" in held:
            return linear(hidden, held["down_proj"][expert])
        left = self.left("down", expert, held, hidden)
        return (hidden @ left) @ self.mixture("down", expert, hidden)  # W_downᵀ ≈ A B̃

    def _rows(self, family: str, expert: int, held: Held, x: torch.Tensor) -> torch.Tensor:
        if family not in self.places:
            return linear(x, held[f"{family}_dense"][expert])
        return linear(linear(x, self.mixture(family, expert, x)), self.left(family, expert, held, x))

    def left(self, family: str, expert: int, held: Held, like: torch.Tensor) -> torch.Tensor:
        """The left factor of an expert; a packed one in the dtype of another tensor."""
        packing = self.packings.get(family)
        if packing is None:
            return held[f"{family}_left"][expert]
        return unpacked(self, f"{family}_left", expert, packing, like.dtype)

    def mixture(self, family: str, expert: int, like: torch.Tensor) -> torch.Tensor:
        """B̃ of an expert, in the dtype and on the device of another tensor."""
        place = self.places[family]
        return self._banks[0].mixture(place.bank, place.row(expert), like)

    def precompose(self, dtype: torch.dtype) -> None:
        """Put the mixtures of all experts into the cache, in the dtype that the model computes in."""
        for family in self.places:
            held = f"{family}_left{PACKED}" if family in self.packings else f"{family}_left"
            like = torch.empty(0, dtype=dtype, device=getattr(self, held).device)
            for expert in range(self.num_experts):
                self.mixture(family, expert, like)

    def require_packed(self, name: str) -> None:
        """Check left factors that are packed; `name` is the module's.

        Raises
        ------
        GlobeError
            As :func:`globe.checkpoint.formats.packed.require_parts`.
        """
        for family, packing in self.packings.items():
            if family in self.places and self.get_buffer(f"{family}_left{SCALE}").device.type != "meta":
                require_packed(self, f"{family}_left", f"{name}.{family}_left", packing)


def check_experts(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters gate_up_proj (E, 2p, d) and down_proj (E, d, p) of an experts module of transformers.

    Raises
    ------
    GlobeError
        If it is made in another way than all supported architectures' are.
    """
    parameters = dict(module.named_parameters())
    odd = set(parameters) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn")
    odd = odd or getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True)
    if odd or parameters["gate_up_proj"].ndim != 3:
        raise GlobeError(f"{type(module).__name__} of transformers is not made of gate_up_proj, down_proj and act_fn")
    return parameters["gate_up_proj"], parameters["down_proj"]
