"""Tensors that are stored quantised, and the `quantization_config` of config.json that says how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from globe.errors import GlobeError

KEY = "quantization_config"
_AS_THEY_ARE = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # weights, positions and masks; never codes of weights


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
