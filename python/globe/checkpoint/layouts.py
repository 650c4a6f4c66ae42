"""How families of architectures name the tensors of their routed experts: layouts.json."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

PREFIXES = (
    "model.",
    "model.language_model.",
    "language_model.model.",
    "model.decoder.",
    "model.llm.",
    "thinker.model.",
    "backbone.",
    "",
)
FAMILIES = ("gate", "up", "down")
_BEFORE = "{prefix}layers.{layer}."  # in every template
_NAME = re.compile(
    rf"(?:{'|'.join(map(re.escape, PREFIXES))})layers\.([0-9]{{1,6}})\.(?:(.+?)\.([0-9]{{1,6}})\.)?(.+)", re.DOTALL
)


@dataclass(frozen=True)
class Layout:
    """One entry of layouts.json.

    Parameters
    ----------
    name : str
    model_types : tuple of str
        What config.json says of the architectures that are named so.
    experts_keys, width_keys : tuple of str
        Where config.json states the experts per layer and their width.
    templates : dict
        Per family the name of one expert's matrix, where there is a tensor for each.
    fused : dict
        Per family the name of the tensor of all experts of a layer; where gate's is up's too, it has gate above up.
    every_layer : bool
        Whether every layer has experts where config.json does not say which have.
    transposed, interleaved : bool
        Of fused tensors: whether they are [E, inputs, outputs] instead of [E, outputs, inputs], and whether outputs of
        gate and up take turns.
    groups : bool
        Whether experts past the number that config.json states are of another group, which is left alone.
    copies : bool
        Whether transformers runs every expert of a layer on all tokens, zeros in place of those of others.
    """

    name: str
    model_types: tuple[str, ...]
    experts_keys: tuple[str, ...]
    width_keys: tuple[str, ...]
    templates: dict[str, str]
    fused: dict[str, str]
    every_layer: bool = True
    transposed: bool = False
    interleaved: bool = False
    groups: bool = False
    copies: bool = False

    def is_of(self, model_type: object) -> bool:
        """Whether it is that of a model type; of its language model alone too."""
        return isinstance(model_type, str) and model_type.removesuffix("_text") in self._types

    @cached_property
    def _types(self) -> set[str]:
        return {name.removesuffix("_text") for name in self.model_types}

    @property
    def families(self) -> tuple[str, ...]:
        """The families that its experts have: without a gate two."""
        return tuple(name for name in FAMILIES if name in self.templates or name in self.fused)

    def place(self, family: str, tensor: str) -> tuple[int, int | None] | None:
        """The layer and the expert of a family (None: all of the layer's experts) that a tensor holds, if any."""
        found = self.held(tensor)
        return found[:2] if found is not None and family in found[2] else None

    def held(self, tensor: str) -> tuple[int, int | None, tuple[str, ...]] | None:
        """The layer, the expert (None: all of the layer's) and the families that a tensor holds, if any."""
        match = _NAME.fullmatch(tensor)
        if match is None:
            return None
        layer, before, expert, behind = match.groups()
        families = self._forms.get((before, behind))
        return (int(layer), None if expert is None else int(expert), families) if families is not None else None

    @cached_property
    def _forms(self) -> dict[tuple[str | None, str], tuple[str, ...]]:
        """The families of a name, by what stands between the layer and the expert's number, and behind the last."""
        found: dict[tuple[str | None, str], tuple[str, ...]] = {}
        for family in self.families:
            for template in {self.templates.get(family), self.fused.get(family)} - {None}:
                assert template is not None
                before, expert, behind = template.removeprefix(_BEFORE).partition(".{expert}.")
                key = (before, behind) if expert else (None, before)
                found[key] = (*found.get(key, ()), family)
        return found

    def names(self, family: str) -> Iterator[str]:
        """The templates of a family."""
        for forms in (self.templates, self.fused):
            if family in forms:
                yield forms[family].replace("{prefix}", PREFIXES[0])


@lru_cache
def read_layouts() -> tuple[Layout, ...]:
    """The registry of tensor-name templates, layouts.json."""
    text = importlib.resources.files("globe.checkpoint").joinpath("layouts.json").read_text(encoding="utf-8")
    return tuple(
        Layout(
            entry["name"],
            tuple(entry["model_types"]),
            tuple(entry["experts_keys"]),
            tuple(entry["width_keys"]),
            entry.get("templates", {}),
            _fused(entry),
            entry.get("every_layer", True),
            entry.get("transposed", False),
            entry.get("interleaved", False),
            entry.get("groups", False),
            entry.get("copies", False),
        )
        for entry in json.loads(text)
    )


def _fused(entry: dict[str, Any]) -> dict[str, str]:
    """The tensors of all experts of a layer: of gate and up together, or of each family for itself."""
    if "fused" in entry:
        return {"gate": entry["fused"], "up": entry["fused"], "down": entry["fused_down"]}
    stacks: dict[str, str] = entry.get("stacks", {})
    return stacks
