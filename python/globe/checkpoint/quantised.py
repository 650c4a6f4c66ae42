"""Tensors that are stored quantised, and the `quantization_config` of config.json that says how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from globe.errors import GlobeError

KEY = "quantization_config"
_AS_THEY_ARE = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # weights, positions and masks; never codes of weights


TEXT_CONFIGS = ("thinker_config", "text_config", "language_config", "llm_config")  # of several models


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of config.json, or of its language model where several models have one config.json."""
    for name in quantization_place(config):
        config = config[name]
    return config.get(KEY)


def with_quantization(
    config: Mapping[str, Any], quantization: Any, inside: Sequence[str] | None = None
) -> dict[str, Any]:
    """config.json with another `quantization_config` where it has one, or `inside`; without any for None.

    Raises
    ------
    GlobeError
        If config.json has nothing to go inside of.
    """
    place = quantization_place(config) if inside is None else inside
    if place:
        name, *rest = place
        if not isinstance(config.get(name), dict):
            raise GlobeError(f"config.json has no {name} to say in how tensors are quantised; fetch it again")
        return {**config, name: with_quantization(config[name], quantization, rest)}
    found = {key: value for key, value in config.items() if key != KEY}
    return found if quantization is None else {**found, KEY: quantization}


def quantization_place(config: Mapping[str, Any]) -> list[str]:
    """The keys of config.json that one inside another hold its `quantization_config`; none where it is its own."""
    name = _inside(config)
    return [] if name is None else [name, *quantization_place(config[name])]


def _inside(config: Mapping[str, Any]) -> str | None:
    if config.get(KEY) is not None:
        return None
    inner = ((name, config.get(name)) for name in TEXT_CONFIGS)
    return next((name for name, value in inner if isinstance(value, dict) and quantization_of(value) is not None), None)


def is_quantised(dtype: str) -> bool:
    """Whether in no tensor of a dtype (safetensors' name) numbers are plain."""
    return dtype not in _AS_THEY_ARE


def quantised_dtypes(dtypes: Iterable[str]) -> list[str]:
    """Those dtypes (safetensors' names) in which no tensor holds plain numbers: F8_E4M3, I32 of GPTQ, U8 …"""
    return sorted(set(dtypes) - set(_AS_THEY_ARE))


def told(dtypes: Iterable[str], quantization: Any) -> str:
    """What is quantised and how, such as "non-expert tensors are F8_E4M3, quant_method fp8"."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    how = f"quant_method {method}" if method else f"config.json has no {KEY} that says how"
    return f"non-expert tensors are {', '.join(quantised_dtypes(dtypes))}, {how}"


def require_plain(what: object, dtypes: Iterable[str], quantization: Any, remedy: str = "dequantise first") -> None:
    """Refuse to run tensors that would have to be dequantised.

    Parameters
    ----------
    what : object
        The directory or the file to name.
    dtypes : iterable of str
        Of the tensors.
    quantization : Any
        The source's `quantization_config`, or None.
    remedy : str
        What to do.

    Raises
    ------
    GlobeError
        If one of the dtypes holds quantised numbers.
    """
    kinds = quantised_dtypes(dtypes)
    if kinds:
        raise GlobeError(f"{what}: {told(kinds, quantization)}: {remedy}")


def made_of(config: Mapping[str, Any]) -> str:
    """The name of the model that a checkpoint was made of, as ", NAME", where config.json tells it."""
    keys = ("base_model", "base_model_name_or_path", "_name_or_path")
    names = (config.get(key) for key in keys)
    name = next((name for name in names if isinstance(name, str) and name.strip()), None)
    return f", {name}" if name is not None and "\n" not in name else ""
