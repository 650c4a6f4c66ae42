"""The parameters of a loaded model that may move, and the stored tensors that they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from globe.artifact.factored import Factored, left_name
from globe.checkpoint.layouts import Layout, read_layouts
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorInfo, read_tensor
from globe.errors import GlobeError, UsageError
from globe.hf.experts import FactoredExperts

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Moving:
    """A parameter that may move, what it is in fp32, and the names of the stored tensors that it is.

    `master` shares the memory of a parameter in fp32; of any other it is what moves, and the parameter is it, rounded.
    `stored` has one name for the whole parameter, or one for each of its experts, in their order.
    """

    name: str
    part: str
    parameter: torch.nn.Parameter
    master: torch.Tensor
    stored: tuple[str, ...]

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors' names and their values now, not rounded."""
        yield from zip(self.stored, [self.master] if len(self.stored) == 1 else self.master.unbind(), strict=True)

    def set(self, values: torch.Tensor) -> None:
        """Give the master other values, and the parameter what it holds of them."""
        self.master.copy_(values)
        self.parameter.detach().copy_(self.master)

    def gather(self, _: torch.Tensor) -> None:
        """Add the parameter's gradient to the master's, in fp32, and free it."""
        found, self.parameter.grad = self.parameter.grad, None
        if found is not None:
            self.master.grad = found.float() if self.master.grad is None else self.master.grad.add_(found)


def require_movable(factored: Factored, parts: tuple[str, ...]) -> None:
    """Refuse to move left factors that are packed in integers, which have no gradient.

    Raises
    ------
    UsageError
        Says what would do.
    """
    packed = {name: told["packed"] for name, told in factored.manifest["families"].items() if "packed" in told}
    if packed and "lefts" in parts:
        name, packing = next(iter(packed.items()))
        others = ",".join(part for part in parts if part != "lefts") or "norms"
        raise UsageError(
            f"{factored.directory}: left factors of family {name} are stored in {packing['bits']} bits, and only bf16 "
            f"ones can move; use --parts {others}, or compress with --left-bits 16 to heal it"
        )


def moving(model: Any, factored: Factored, parts: tuple[str, ...]) -> tuple[list[Moving], dict[str, TensorInfo]]:
    """The parameters of the parts, in the model's order, and where every one of their stored tensors lies.

    A norm of which no stored tensor has the name stays as it is.

    Raises
    ------
    GlobeError
        If the experts of the model are not where the files have them, or nothing of the parts is there.
    """
    stored = {name: info for header in factored.shards.values() for name, info in header.tensors.items()}
    layout = next(each for each in read_layouts() if each.name == factored.manifest["source"]["layout"])
    found: list[Moving] = []
    for path, module in model.named_modules():
        if isinstance(module, FactoredExperts):
            match = _LAYER.search(path)
            assert match is not None
            names = _expert_tensors(factored, layout, int(match[1]))
            for name, parameter in module.named_parameters(recurse=False):
                part, family = _kind(name)
                if part in parts:
                    found.append(Moving(f"{path}.{name}", part, parameter, parameter.detach(), names[family]))
        elif "norms" in parts and "norm" in path.rpartition(".")[2].lower():
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if parameter.ndim == 1 and name in stored and stored[name].dtype in _FLOATS:
                    found.append(Moving(name, "norms", parameter, parameter.detach(), (name,)))
    for each in found:
        for name, value in each.values():
            if name not in stored or stored[name].shape != tuple(value.shape):
                raise GlobeError(f"tensor {name} is not of the shape {list(value.shape)} that the model has")
            if stored[name].dtype not in _FLOATS:
                raise GlobeError(f"tensor {name} is {stored[name].dtype}; expected one of {', '.join(_FLOATS)}")
    if not found:
        raise GlobeError(f"{factored.directory}: it has none of the parts {', '.join(parts)} that are to move")
    found = [each if each.master.dtype == torch.float32 else _with_master(each, stored) for each in found]
    return found, {name: stored[name] for each in found for name in each.stored}


def by_layers(parts: list[Moving], count: int | None) -> list[list[Moving]]:
    """The parts in groups of so many layers each, which follow one another; what is of no layer in the last group."""
    layers = sorted({int(match[1]) for each in parts if (match := _LAYER.search(each.name)) is not None})
    if count is None or not layers:
        return [parts]
    groups: list[list[Moving]] = [[] for _ in layers[::count]]
    for each in parts:
        match = _LAYER.search(each.name)
        groups[layers.index(int(match[1])) // count if match is not None else -1].append(each)
    return groups


@contextmanager
def learning(parts: list[Moving]) -> Iterator[None]:
    """Let the parameters have gradients, which gather in their masters as soon as they are there."""
    for each in parts:
        each.parameter.requires_grad_(True)
    hooks = [each.parameter.register_post_accumulate_grad_hook(each.gather) for each in parts]
    try:
        yield
    finally:
        for each, hook in zip(parts, hooks, strict=True):
            each.parameter.requires_grad_(False)
            hook.remove()


def round_to_stored(parts: list[Moving], stored: dict[str, TensorInfo]) -> None:
    """Round every master to what its stored tensors will hold."""
    for each in parts:
        for name, value in each.values():
            value.copy_(value.to(TORCH_DTYPES[stored[name].dtype]))
        each.set(each.master)


def _with_master(each: Moving, stored: dict[str, TensorInfo]) -> Moving:
    """With a master in fp32, of the values that are stored."""
    master = torch.empty_like(each.master, dtype=torch.float32)
    found = replace(each, master=master)
    for name, value in found.values():
        value.copy_(read_tensor(stored[name]))
    return found


def _kind(name: str) -> tuple[str, str]:
    """The part and the family of a parameter of `FactoredExperts`."""
    if name.endswith("_left"):
        return "lefts", name.removesuffix("_left")
    return ("down", "down") if name == "down_proj" else ("", "")


def _expert_tensors(factored: Factored, layout: Layout, layer: int) -> dict[str, tuple[str, ...]]:
    """Per family the stored tensors of a layer's experts, in their order: left factors, or down as it is."""
    families = factored.manifest["families"]
    found: dict[str, dict[int, str]] = {"gate": {}, "up": {}, "down": {}}
    for shard in factored.manifest["source"]["shards"]:
        for tensor in shard["tensors"]:
            for family, names in found.items():
                place = layout.place(family, tensor)
                if place is not None and place[0] == layer:
                    factors = tensor in families.get(family, {"tensors": {}})["tensors"]
                    names[place[1] or 0] = left_name(tensor, family) if factors else tensor
    return {family: tuple(names[expert] for expert in sorted(names)) for family, names in found.items()}
