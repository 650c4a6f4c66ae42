"""Whether every routed expert that a checkpoint must have is there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from globe.checkpoint.foreign import other_names
from globe.checkpoint.layouts import Layout
from globe.errors import GlobeError

Held = Mapping[str, Mapping[tuple[int, int], str]]  # per family: layer and number of an expert, its tensor

_LAYER_KEYS = ("mlp_layer_types", "moe_layers", "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace",
               "moe_layer_freq")  # fmt: skip
_MOST_LAYERS = 10_000
_DENSE = re.compile(r"model\.layers\.(\d+)\.(?:mlp|feed_forward|block_sparse_moe)\.(?:down_proj|w2)\.")


@dataclass(frozen=True)
class Source:
    """What the experts are judged by: directory, config.json, layout, layers counted, and all tensors' names."""

    directory: object
    config: Mapping[str, Any]
    layout: Layout
    layers: int | None
    tensors: Iterable[str]


def require_complete(source: Source, held: Held) -> list[str]:
    """Check the numbers of the experts, that all families have the same, and that all layers have them.

    A family without any expert is passed over.

    Returns
    -------
    list of str
        What is merely noteworthy.

    Raises
    ------
    GlobeError
        If an expert or a layer's experts are missing, by the name of a tensor or the number of the layer.
    """
    families = {name: numbers for name, numbers in held.items() if numbers}
    noted = _require_numbers(source, families)
    with_experts = {layer for numbers in families.values() for layer, _ in numbers}
    stated = stated_layers(source.config, source.layers, every=source.layout.every_layer)
    if stated is None:
        return noted
    for layer in sorted(stated - with_experts):
        mine = [name for name in source.tensors if name.startswith(f"model.layers.{layer}.")]
        told = other_names(mine)
        said = ", ".join(f"{key} {source.config[key]}" for key in _LAYER_KEYS if key in source.config)
        raise GlobeError(
            f"{source.directory}: layer {layer} has no routed experts that are known, and config.json"
            f"{f' ({said})' if said else ''} says that it has some"
            + (f"; {told}" if told else ": fetch its tensors, or mend config.json")
        )
    extra = sorted(with_experts - stated)
    if not extra:
        return noted
    said = f"config.json says that {_layers(extra)} no routed experts, but the weight files have some there"
    dense = {int(found[1]) for name in source.tensors if (found := _DENSE.match(name))}
    if set(extra) - dense:
        lacking = min(set(extra) - dense)
        raise GlobeError(f"{source.directory}: {said}, and layer {lacking} lacks the dense ones: mend config.json")
    return [*noted, f"{said}: transformers drops them"]


def _layers(numbers: Sequence[int]) -> str:
    return f"layer {numbers[0]} has" if len(numbers) == 1 else f"layers {_some(numbers)} have"


def stated_layers(config: Mapping[str, Any], layers: int | None, *, every: bool = True) -> set[int] | None:
    """The layers that have routed experts, as config.json says; None if it does not say, or says so of `every` layer.

    The keys are those of transformers' configurations and of published files beside them.
    """
    if layers is None:
        return None
    everything = range(min(layers, _MOST_LAYERS))
    kinds, chosen = config.get("mlp_layer_types"), config.get("moe_layers")
    if isinstance(kinds, list) and len(kinds) == layers:
        return {layer for layer in everything if kinds[layer] != "dense"}
    if isinstance(chosen, list):
        return {layer for layer in everything if layer in chosen}
    if not every and not any(_is_count(config.get(key)) for key in ("first_k_dense_replace", "decoder_sparse_step")):
        return None
    if "n_routed_experts" in config and not _is_count(config.get("first_k_dense_replace")):
        return None  # transformers has a default for each architecture
    first, step = config.get("first_k_dense_replace"), config.get("decoder_sparse_step")
    dense, frequency = config.get("mlp_only_layers"), config.get("moe_layer_freq")
    found = set(everything)
    if _is_count(first):
        found -= set(range(min(first, _MOST_LAYERS)))
    if isinstance(dense, list):
        found = {layer for layer in found if layer not in dense}
    if _is_count(step) and step > 0:
        found = {layer for layer in found if (layer + 1) % step == 0}
    if isinstance(frequency, list) and len(frequency) == layers:
        found = {layer for layer in found if frequency[layer]}
    elif _is_count(frequency) and frequency > 0:
        found = {layer for layer in found if layer % frequency == 0}
    return found


def _require_numbers(source: Source, families: Held) -> list[str]:
    """Check that all families of a layer have the same experts, and all layers as many; numbers may leave some out.

    transformers puts a layer's experts into a stack in the order of their numbers, and has as many in every layer.
    """
    held: dict[int, set[int]] = {}
    for numbers in families.values():
        for layer, number in numbers:
            held.setdefault(layer, set()).add(number)
    for family, numbers in families.items():
        for layer in sorted(held):
            missing = min((number for number in held[layer] if (layer, number) not in numbers), default=None)
            if missing is not None:
                other = next(name for name in families if (layer, missing) in families[name])
                raise GlobeError(
                    f"{source.directory}: tensor {_name(source.layout, family, layer, missing)} is missing: family "
                    f"{family} of layer {layer} has no expert {missing}, which family {other} has; fetch the "
                    "checkpoint again"
                )
    _require_as_many(source, next(iter(families), ""), held)
    gaps = [layer for layer in sorted(held) if max(held[layer]) >= len(held[layer])]
    if not gaps:
        return []
    shown = f"layer {gaps[0]} has experts {_some(sorted(held[gaps[0]]))}"
    count, stated = len(held[gaps[0]]), stated_experts(source.config, source.layout)
    if stated != count or source.layout.groups:
        states = f"config.json states {stated}" if stated is not None else "config.json states no number of them"
        raise GlobeError(
            f"{source.directory}: {shown}; expected 0 to {count - 1}, and {states}: fetch the missing ones, or where "
            f"they were pruned state {count} and leave as many rows in the routers"
            + (", and number them anew" if source.layout.groups else "")
        )
    return [f"{shown}: taken as 0 to {count - 1} in this order, as transformers does"]


def _require_as_many(source: Source, family: str, held: Mapping[int, set[int]]) -> None:
    """Check that layers have as many experts as each other; `family` is one of those that have them."""
    few, many = (pick(sorted(held), key=lambda layer: len(held[layer]), default=0) for pick in (min, max))
    if held and len(held[few]) < len(held[many]):
        missing = ""
        if held[few] < held[many]:
            missing = f"tensor {_name(source.layout, family, few, min(held[many] - held[few]))} is missing: "
        raise GlobeError(
            f"{source.directory}: {missing}layer {few} has {len(held[few])} routed experts, layer {many} has "
            f"{len(held[many])}, and transformers has as many in every layer; fetch the checkpoint again, or prune all "
            "layers to one number"
        )


def stated_experts(config: Mapping[str, Any], layout: Layout) -> int | None:
    """The experts of a layer as config.json states them, if it does."""
    return next((config[key] for key in layout.experts_keys if isinstance(config.get(key), int)), None)


def _name(layout: Layout, family: str, layer: int, expert: int) -> str:
    return " or ".join(
        template.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for template in layout.names(family)
    )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
