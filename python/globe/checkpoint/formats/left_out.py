"""A `quantization_config` that leaves modules out, whose weights are no longer stored as codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SKIPPED = ("modules_to_not_convert", "ignored_layers")  # of fp8 and mxfp4; the second is read where there is no first
# transformers 5.23 loads the experts by the first group whose patterns speak of experts, whatever is ignored, and of
# all formats this alone lets weights without scales through.
_AS_THEY_ARE = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "format": "float-quantized",
}
_GROUP = "experts_as_they_are"


def modules_of(tensors: Iterable[str]) -> list[str]:
    """The modules that hold these experts, each once, in the order of the tensors."""
    found = (re.sub(r"(\.experts)\..*", r"\1", name).removesuffix(".weight") for name in tensors)
    return list(dict.fromkeys(found))


def leaving_out(quantization: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """The configuration with these modules among those that are as they are.

    compressed-tensors is told of every module inside them, for it matches whole names or patterns (``re:``).
    """
    if quantization.get("quant_method") == "compressed-tensors":
        patterns = [f"re:{re.escape(module)}(\\..*)?$" for module in modules]
        groups = {_GROUP: {"targets": patterns, **_AS_THEY_ARE}, **quantization["config_groups"]}
        return {**quantization, "config_groups": groups, "ignore": [*(quantization.get("ignore") or []), *patterns]}
    key = next((key for key in _SKIPPED if quantization.get(key) is not None), _SKIPPED[0])
    stated = quantization.get(key) or []
    return {**quantization, key: [*stated, *(module for module in modules if module not in stated)]}
