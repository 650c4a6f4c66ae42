"""The routed experts of a layer, held as left factors: y = (x B̃ᵀ) Aᵀ in place of y = x Wᵀ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.functional import linear

from globe.checkpoint.expert_module import ExpertModule, expert_module
from globe.checkpoint.formats.packed import PACKED, SCALE, Packing
from globe.checkpoint.layouts import FAMILIES
from globe.hf.banks import AsStored, Bank, Banks, register_packed, require_packed, unpacked
from globe.hf.few_tokens import FewTokens
from globe.hf.offload import Matrices
from globe.hf.packed import packed_linear

_NONE: Mapping[str, Packing] = MappingProxyType({})
_RESIDENT: Mapping[str, Matrices] = MappingProxyType({})
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
    and `up_dense` (E, p, d), or the module's own `gate_up_proj` (`up_proj` of experts without a gate) where neither is
    factored, and its `down_proj`. Biases are the module's own. Packed left factors are buffers `{family}_left_packed`
    and so on, and each is made values of each time it is used.

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
    mapped : mapping
        By parameter, matrices that stay in their files: they are no parameters then.
    """

    def __init__(
        self,
        dense: nn.Module,
        places: dict[str, Place],
        banks: Banks,
        packings: Mapping[str, Packing] = _NONE,
        mapped: Mapping[str, Matrices] = _RESIDENT,
    ) -> None:
        super().__init__()
        form = expert_module(dense)
        first: nn.Parameter = getattr(dense, form.first)
        experts, width, size = form.shape[0], form.shape[2], form.turned(first).shape[2]
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, size, width
        self.places, self.packings, self.mapped = places, packings, dict(mapped)
        # In tuples, so that they are no submodules: the banks of every layer, and the module without its parameters.
        self._banks = (banks,)
        self._form = (ExpertModule(_emptied(dense), form.first, form.transposed, form.interleaved),)
        self._few = FewTokens()
        kept = {"down_proj"} if "down" not in places else set()
        kept |= {form.first} if not places.keys() & {"gate", "up"} else set()
        for name, value in dense._parameters.items():
            if name in kept or name.endswith("_bias"):
                self.register_parameter(name, value)
        for name, child in dense.named_children():
            self.add_module(name, child)
        for family in FAMILIES if form.gated else FAMILIES[1:]:
            if family in places:
                rank = places[family].bank.rank
                packing = packings.get(family)
                if packing is not None:
                    words, groups = (experts, width, packing.words(rank)), (experts, width, rank // packing.group)
                    register_packed(self, f"{family}_left", words, groups)
                    places[family].bank.orthonormal = True
                    continue
                if f"{family}_left" not in mapped:
                    self.register_parameter(f"{family}_left", nn.Parameter(first.new_empty(experts, width, rank)))
            elif family != "down" and form.first not in kept:
                self.register_parameter(f"{family}_dense", nn.Parameter(first.new_empty(experts, width, size)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Σ_k weight_tk · expert_{index_tk}(x_t), the tokens grouped by expert; index E stands for none.

        Without indices the tokens are those of one expert after another, equally many of each (Llama 4).

        Parameters are taken apart once, and rows by `index_select`: their gradients then are one stack of the experts'
        and sums of rows, and not a tensor of all experts for each.
        """
        if top_k_index is not None and top_k_weights is not None:
            made = self._few(self, hidden_states, top_k_index, top_k_weights)
            if made is not None:
                return made
        held = {name: getattr(self, name).unbind() for name in self._parameters}
        if top_k_index is None or top_k_weights is None:
            shared = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(expert, held, x) for expert, x in enumerate(shared)])
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

    @property
    def form(self) -> ExpertModule:
        """How the module of transformers holds its experts, and what it makes of their outputs."""
        return self._form[0]

    @property
    def banks(self) -> Banks:
        """The banks of the model."""
        return self._banks[0]

    def matrices(self, family: str) -> torch.Tensor | Matrices:
        """What a family has of every expert: its left factors (E, p, r), or its matrices (E, outputs, inputs)."""
        for name in (f"{family}_left", f"{family}_dense"):
            if name in self.mapped or name in self._parameters:
                return self._stack(name)
        first = self.form.first
        if family == "down" or not self.form.gated:
            return self._turned("down_proj" if family == "down" else first)
        both = self._turned(first)
        which = 0 if family == "gate" else 1
        if isinstance(both, Matrices):
            return Matrices(self.form.halves(matrix, 0)[which] for matrix in both)
        return self.form.halves(both, 1)[which]

    def _stack(self, name: str) -> torch.Tensor | Matrices:
        found: torch.Tensor | Matrices = self.mapped[name] if name in self.mapped else getattr(self, name)
        return found

    def _turned(self, name: str) -> torch.Tensor | Matrices:
        found = self._stack(name)
        return Matrices(map(self.form.turned, found)) if isinstance(found, Matrices) else self.form.turned(found)

    def _expert(self, expert: int, held: Held, x: torch.Tensor) -> torch.Tensor:
        form = self.form
        gate, up = self._outputs(expert, held, x)
        hidden = form.hidden(gate, up)
        if "down" not in self.places:
            made = linear(hidden, form.turned(self._matrix("down_proj", expert, held, hidden)))
        else:
            left = self.left("down", expert, held, hidden)
            made = (hidden @ left) @ self.mixture("down", expert, hidden)  # W_downᵀ ≈ A B̃
        if "down_proj_bias" in held:
            made = made + held["down_proj_bias"][expert]
        return form.finished(made)

    def _outputs(self, expert: int, held: Held, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What gate and up make of tokens, with their biases; None for the gate where there is none."""
        form = self.form
        biases = held.get(f"{form.first}_bias")
        bias = biases[expert] if biases is not None else None
        if form.first in held:
            both = linear(x, form.turned(held[form.first][expert]), bias)
            return form.halves(both) if form.gated else (None, both)
        made = [self._rows(family, expert, held, x) for family in (("gate", "up") if form.gated else ("up",))]
        if bias is not None:
            each = form.halves(bias) if form.gated else (bias,)
            made = [values + shift for values, shift in zip(made, each, strict=True)]
        return (made[0] if form.gated else None), made[-1]

    def _rows(self, family: str, expert: int, held: Held, x: torch.Tensor) -> torch.Tensor:
        if family not in self.places:
            return linear(x, held[f"{family}_dense"][expert])
        mixed, packing = linear(x, self.mixture(family, expert, x)), self.packings.get(family)
        if packing is not None:
            return packed_linear(mixed, self, f"{family}_left", expert, packing)
        return linear(mixed, self.left(family, expert, held, mixed))

    def left(self, family: str, expert: int, held: Held, like: torch.Tensor) -> torch.Tensor:
        """The left factor of an expert; one that is packed or mapped in the dtype of another tensor."""
        packing = self.packings.get(family)
        if packing is None:
            return self._matrix(f"{family}_left", expert, held, like)
        return unpacked(self, f"{family}_left", expert, packing, like.dtype)

    def _matrix(self, name: str, expert: int, held: Held, like: torch.Tensor) -> torch.Tensor:
        return self.mapped[name][expert].to(like.dtype) if name in self.mapped else held[name][expert]

    def leave_in_files(self, name: str, matrices: Matrices) -> None:
        """Take a parameter from its files in place of holding it."""
        delattr(self, name)
        self.mapped[name] = matrices
        self._few = FewTokens()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FactoredExperts:
        super()._apply(fn, recurse)
        self._few = FewTokens()  # which would hold what was there before
        return self

    def mixture(self, family: str, expert: int, like: torch.Tensor) -> torch.Tensor:
        """B̃ of an expert, in the dtype and on the device of another tensor."""
        place = self.places[family]
        return self.banks.mixture(place.bank, place.row(expert), like)

    def precompose(self, dtype: torch.dtype) -> None:
        """Put the mixtures of all experts into the cache, in the dtype that the model computes in."""
        for family in self.places:
            held = f"{family}_left{PACKED}" if family in self.packings else f"{family}_left"
            device = "cpu" if held in self.mapped else getattr(self, held).device
            like = torch.empty(0, dtype=dtype, device=device)
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


def _emptied(module: nn.Module) -> nn.Module:
    """A copy of a module without its parameters: what it computes of others."""
    found = copy(module)
    found._parameters = {}
    return found
