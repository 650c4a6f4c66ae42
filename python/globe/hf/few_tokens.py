"""The routed experts of a layer for a few tokens, or small ones: one native call in place of many small products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe import _native
from globe.checkpoint.layouts import FAMILIES
from globe.compute.gemm import to_numpy
from globe.statistics.activations import name_of

if TYPE_CHECKING:
    from globe.hf.experts import FactoredExperts

FEW = 8  # tokens, with which a product takes about as long as reading its matrix
_WORTH = 64_000_000  # operations of an expert, which take two threads as long as its calls in Python

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Families = dict[str, "_native.ExpertFamily"]


class FewTokens:
    """What :class:`globe.hf.experts.FactoredExperts` on a CPU make of a few tokens, where no gradient is asked for.

    Of many too, where the experts are so small that products in Python would take longer. Those are also for packed
    left factors, biases, experts without a gate or with a gating of their own, and activations other than SiLU, both
    GELU and ReLU.
    """

    def __init__(self) -> None:
        self._activation: int | None = None
        self._at: tuple[int, ...] | None = None  # addresses of what the families were made of
        self._families: Families | None = None

    def __reduce__(self) -> tuple[type[FewTokens], tuple[()]]:
        return FewTokens, ()  # a copy of a model has memory of its own

    def __call__(
        self, experts: FactoredExperts, x: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Σ_k w_tk · expert_{picked_tk}(x_t), (n, d) in the dtype of x; None where products in Python are the way.

        Summed in fp32 from the tokens to the result, which is rounded once.
        """
        if x.ndim != 2 or x.device.type != "cpu" or x.dtype not in _DTYPES or torch.is_grad_enabled():
            return None
        families, activation = self._current(experts), self._activation
        if families is None or activation is None or experts.banks.bits != 16:
            return None
        if len(x) > FEW and not self._is_little(experts, picked.numel()):
            return None
        (gate, _), (up, _), (down, _) = held = [self._mixtures(experts, family, picked, x) for family in FAMILIES]
        x = x.contiguous()
        out = torch.empty_like(x)
        _native.layer_forward(
            families["gate"],
            families["up"],
            families["down"],
            gate,
            up,
            down,
            _DTYPES[x.dtype],
            activation,
            experts.num_experts,
            picked.long().contiguous().numpy(),
            weights.float().contiguous().numpy(),
            _words(x),
            _words(out),
            torch.get_num_threads(),
        )
        del held  # mixtures, which had to live so long
        return out

    def _is_little(self, experts: FactoredExperts, pairs: int) -> bool:
        """Whether so many tokens and experts are little work for each expert."""
        d, p = experts.hidden_dim, experts.intermediate_dim
        ranks = [experts.places[family].bank.rank if family in experts.places else None for family in FAMILIES]
        each = sum(2 * p * d if rank is None else 2 * rank * (p + d) for rank in ranks)
        return pairs * each <= _WORTH * min(pairs, experts.num_experts)

    def _current(self, experts: FactoredExperts) -> Families | None:
        """The families where their matrices lie now; None if there is no such way for them."""
        banks = (place.bank.stored for place in experts.places.values())
        at = tuple(part.data_ptr() for part in (*experts.parameters(recurse=False), *banks))
        if at != self._at:
            self._families, self._at = self._made(experts), at
        return self._families

    def _made(self, experts: FactoredExperts) -> Families | None:
        form = experts.form
        unpacked = not experts.packings and all(place.bank.packing is None for place in experts.places.values())
        plain = form.gated and not form.own_gating and getattr(form.module, "post_expert_norm", None) is None
        biased = any(name.endswith("_bias") for name in experts._parameters)
        tensors = [*experts.parameters(recurse=False), *(place.bank.stored for place in experts.places.values())]
        here = all(part.device.type == "cpu" and part.dtype in _DTYPES for part in tensors)
        if biased or not (unpacked and plain and here):
            return None
        name = name_of(form.module.act_fn, torch.device("cpu"))
        self._activation = None if name is None else _ACTIVATIONS.get(name)
        if self._activation is None:
            return None
        made = [self._family(experts, family) for family in FAMILIES]
        found = {family: each for family, each in zip(FAMILIES, made, strict=True) if each is not None}
        return found if len(found) == len(FAMILIES) else None

    def _family(self, experts: FactoredExperts, family: str) -> _native.ExpertFamily | None:
        """None where the rows of its matrices have gaps inside."""
        matrices = experts.matrices(family)
        first = matrices[0][None] if isinstance(matrices, tuple) else matrices.detach()
        if first.stride(2) != 1 or first.dtype not in _DTYPES:
            return None
        given: list[Any] = [_words(first), _DTYPES[first.dtype]]
        place = experts.places.get(family)
        if place is not None:
            codes, atoms = place.bank.rows, place.bank.stored
            given += [_words(atoms.flatten(1)), _DTYPES[atoms.dtype], codes.indptr.astype(np.int64)]
            given += [codes.indices.astype(np.int32), codes.data.astype(np.float32), place.first, place.step]
        found = _native.ExpertFamily(*given)
        if isinstance(matrices, tuple):
            found.place(np.array([matrix.data_ptr() for matrix in matrices], np.uintp))
        return found

    def _mixtures(
        self, experts: FactoredExperts, family: str, picked: torch.Tensor, x: torch.Tensor
    ) -> tuple[NDArray[np.uintp] | None, list[torch.Tensor]]:
        """Where the mixtures lie that the cache has or takes, and themselves; others are composed as they are used."""
        if family not in experts.places:
            return None, []
        place = experts.places[family]
        addresses, kept = np.zeros(experts.num_experts, np.uintp), []
        for expert in set(picked.flatten().tolist()):
            if expert >= experts.num_experts:
                continue
            mixture = experts.banks.held_mixture(place.bank, place.row(expert), x)
            if mixture is not None:
                kept.append(mixture)
                addresses[expert] = mixture.data_ptr()
        return addresses, kept


def _words(tensor: torch.Tensor) -> NDArray[np.generic]:
    """The array of a tensor, of bf16 and fp16 their bits."""
    return to_numpy(tensor) if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()
