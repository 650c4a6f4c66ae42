"""A `quantization_config` that leaves modules out, whose weights are no longer stored as codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SKIPPED = ("modules_to_not_convert", "ignored_layers")  # of fp8 and mxfp4; the second is read where there is no first


def modules_of(tensors: Iterable[str]) -> list[str]:
    """The modules that hold these experts, each once, in the order of the tensors."""
    found = (re.sub(r"(\.experts)\..*", r"\1", name).removesuffix(".weight") for name in tensors)
    return list(dict.fromkeys(found))


def leaving_out(quantization: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """The configuration with these modules among those that are as they are.

    compressed-tensors is told of every module inside them, for it matches whole names or patterns (``re:``).
    """
    if quantization.get("quant_method") == "compressed-tensors":
        ignored = quantization.get("ignore") or []
        return {**quantization, "ignore": [*ignored, *(f"re:{re.escape(module)}(\\..*)?$" for module in modules)]}
    key = next((key for key in _SKIPPED if quantization.get(key) is not None), _SKIPPED[0])
    stated = quantization.get(key) or []
    return {**quantization, key: [*stated, *(module for module in modules if module not in stated)]}
