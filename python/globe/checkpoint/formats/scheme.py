"""How a matrix is stored as codes with scales, as config.json's `quantization_config` says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from globe.checkpoint.quantised import made_of, quantization_of
from globe.errors import GlobeError

REMEDY = "start from the model that this checkpoint was made of"
_METHODS = "fp8, mxfp4 or compressed-tensors"
_FORMATS = {  # of compressed-tensors: type of its numbers, and the bits that are read
    "pack-quantized": ("int", (4, 8)),
    "int-quantized": ("int", (8,)),
    "float-quantized": ("float", (8,)),
    "naive-quantized": ("float", (8,)),
    "nvfp4-pack-quantized": ("float", (4,)),
    "mxfp4-pack-quantized": ("float", (4,)),
}


@dataclass(frozen=True)
class Scheme:
    """What codes are, and how many share a scale.

    Parameters
    ----------
    codes : str
        ``e4m3``, ``int8`` (a byte each), ``e2m1`` (two in a byte), ``packed4`` or ``packed8`` (integers in words of 32
        bits).
    block : tuple of int
        Rows and columns that share a scale; 0 stands for all of them.
    """

    codes: str
    block: tuple[int, int]

    @cached_property
    def text(self) -> str:
        """In words, such as "e4m3 in blocks of 128 × 128"."""
        rows, columns = self.block
        shared = {(0, 0): "a scale a matrix", (1, 0): "a scale a row"}.get((rows, columns))
        if shared is None:
            shared = f"groups of {columns}" if rows == 1 else f"blocks of {rows} × {columns}"
        name = {"packed4": "int4", "packed8": "int8"}.get(self.codes, self.codes)
        return f"{name}, {shared}"


@lru_cache
def _shared(codes: str, block: tuple[int, int]) -> Scheme:
    """One for all tensors that have it, of which there are tens of thousands."""
    return Scheme(codes, block)


def scheme_of(config: Mapping[str, Any], tensor: str, dtype: str) -> Scheme:
    """The scheme of a tensor that is stored as codes.

    Parameters
    ----------
    config : mapping
        config.json.
    tensor : str
        Its name without what tells of codes: `….weight`, not `….weight_packed`.
    dtype : str
        Of its codes, for the message.

    Raises
    ------
    GlobeError
        If config.json says nothing of it, or names a format that is not read, or says what cannot be.
    """
    quantization = quantization_of(config)
    if not isinstance(quantization, dict):
        raise GlobeError(
            f"tensor {tensor} is stored as {dtype}, and config.json has no quantization_config that says how; expected "
            f"BF16, F16 or F32, or a quant_method of {_METHODS}: fetch config.json again, or {REMEDY}"
        )
    method = quantization.get("quant_method")
    if method == "fp8":
        return _shared("e4m3", _fp8_block(quantization))
    if method == "mxfp4":
        return _shared("e2m1", (1, 32))
    if method == "compressed-tensors":
        return _compressed(quantization, tensor)
    raise GlobeError(
        f"tensor {tensor} is stored as {dtype} by quant_method {method!r}; expected {_METHODS}, or BF16, F16 or F32: "
        f"{REMEDY}{made_of(config)}"
    )


def _fp8_block(quantization: Mapping[str, Any]) -> tuple[int, int]:
    stated = quantization.get("weight_block_size", [128, 128])
    return (0, 0) if stated is None else _pair(stated, "weight_block_size")


def _pair(stated: object, key: str) -> tuple[int, int]:
    fine = isinstance(stated, list | tuple) and len(stated) == 2
    if not fine or not all(type(size) is int and size > 0 for size in stated):  # type: ignore[attr-defined]
        raise GlobeError(
            f"config.json: quantization_config: {key} is {stated!r}; expected two positive integers, rows and columns "
            "of a block: fetch config.json again"
        )
    return stated[0], stated[1]  # type: ignore[index]


def _compressed(quantization: Mapping[str, Any], tensor: str) -> Scheme:
    group = _group(quantization, tensor)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _wrong("weights", weights, "what weights are quantised to")
    name = group.get("format") or quantization.get("format")
    if name not in _FORMATS:
        raise _wrong("format", name, f"one of {', '.join(_FORMATS)}: {REMEDY}")
    kind, widths = _FORMATS[name]
    bits, stated = weights.get("num_bits"), weights.get("type", "int")
    if name == "naive-quantized" and stated == "int":
        kind = "int"
    if bits not in widths or stated != kind:
        raise _wrong("weights", f"{stated} of {bits} bits in {name}", f"{kind} of {' or '.join(map(str, widths))} bits")
    block = _block(weights, name)
    if kind == "float":
        return _shared("e4m3" if bits == 8 else "e2m1", block)
    return _shared(f"packed{bits}" if name == "pack-quantized" else "int8", block)


def _group(quantization: Mapping[str, Any], tensor: str) -> Mapping[str, Any]:
    """The config group that a tensor's module belongs to: by its own name, or else by a class's, such as Linear."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _wrong("config_groups", groups, "groups of modules with their weights' format")
    module = tensor.removesuffix(".weight")
    listed: list[tuple[str, Mapping[str, Any]]] = []
    for group in groups.values():
        targets = group.get("targets")
        listed += [(str(target), group) for target in targets] if isinstance(targets, list) else []
    mine = [group for target, group in listed if _named(target, module)]
    classes = [group for target, group in listed if "." not in target and not target.startswith("re:")]
    for group in [*mine, *classes]:
        return group
    raise _wrong("config_groups", "no group", f"one whose targets include {module}")


def _named(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        raise _wrong("targets", target, "a regular expression after re:") from None


def _block(weights: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if name == "nvfp4-pack-quantized":
        strategy, size = "group", size or 16
    if name == "mxfp4-pack-quantized":
        strategy, size = "group", size or 32
    if strategy == "tensor":
        return 0, 0
    if strategy == "channel" or (strategy is None and size in (None, -1)):
        return 1, 0
    if strategy == "block":
        return _pair(weights.get("block_structure"), "block_structure")
    if strategy not in ("group", None):
        raise _wrong("strategy", strategy, f"tensor, channel, group or block: {REMEDY}")
    if type(size) is not int or size < 1:
        raise _wrong("group_size", size, "a positive integer")
    return 1, size


def _wrong(key: str, found: object, expected: str) -> GlobeError:
    shown = found if isinstance(found, str) and " " in found else repr(found)
    remedy = "" if REMEDY in expected else ": fetch config.json again"
    return GlobeError(f"config.json: quantization_config: {key} is {shown}; expected {expected}{remedy}")
