"""Load a factored directory to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from globe.artifact.factored import open_factored
from globe.checkpoint.pretrained import text_class
from globe.errors import UsageError
from globe.hf.cache import DEFAULT_BUDGET, read_budget
from globe.hf.experts import FactoredExperts
from globe.hf.offload import require_offload


def load(
    directory: str | Path,
    *,
    cache: int | str | None = DEFAULT_BUDGET,
    cache_bits: int = 16,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    offload: str | None = None,
    **options: Any,
) -> Any:
    """Load a factored directory as the causal language model of its architecture.

    The bank is held once. The mixtures B̃_i that the router asks for are composed when first used and kept in one
    cache for all layers.

    Parameters
    ----------
    directory : str or Path
        Written by `globe compress`, or by `save_pretrained` of a model loaded here.
    cache : int, str or None
        Most bytes of composed mixtures: a number, a size such as "2GiB", "all" to compose and keep every mixture now,
        or 0 to compose each time it is used.
    cache_bits : {16, 8}
        8: the cache keeps mixtures as integers of 8 bits, 32 of a row to a scale, so that twice as many fit in it.
    dtype : str or torch.dtype
        To compute in; by default as the checkpoint states.
    device : str or torch.device
        Where to put the model.
    offload : {"disk"}, optional
        Left factors, and down where it is dense and has a tensor for each expert, stay in their files, mapped into
        memory, and are read when the router asks for an expert; the system keeps what it has room for. The banks, the
        cache and all else are held. Not on a device, and neither with packed left factors nor with `device_map`.
    **options
        Passed on to `from_pretrained` of `AutoModelForCausalLM`, or of `AutoModelForImageTextToText` where the language
        model is one of several.

    Returns
    -------
    PreTrainedModel
        In inference mode. `globe_stats()` tells the cache's hit rate and bytes; `set_cache` gives it another budget.

    Raises
    ------
    GlobeError
        If the directory is not whole.
    UsageError
        If the cache's budget is none, or it has other bits; or where nothing can be offloaded so.
    """
    read_budget(cache)
    _require_bits(cache_bits)
    require_offload(offload, device, options)
    directory = Path(directory)
    if not (directory / "config.json").is_file() or (directory / "globe.json").is_file():
        open_factored(directory)
    options = {"trust_remote_code": False, **options}
    config = options.get("config") or transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if offload is not None:
        config = _offloaded(config, directory, offload)
        options["config"] = config
    model = text_class(transformers, config).from_pretrained(directory, dtype=dtype, **options)
    if not hasattr(model, "globe_stats"):
        raise UsageError(f"{directory}: not factored; use transformers to load it")
    if "device_map" not in options:
        model.to(device)
    set_cache(model, cache, cache_bits)
    return model


def set_cache(model: Any, cache: int | str | None, bits: int = 16) -> None:
    """Give the cache of mixtures of a loaded model another budget, and bits (as `cache` and `cache_bits` of `load`).

    Raises
    ------
    UsageError
        If these are none.
    """
    _require_bits(bits)
    model.globe.cache.resize(cache)
    if model.globe.bits != bits:
        model.globe.cache.clear()
        model.globe.bits = bits
    if read_budget(cache) is None:
        for module in model.modules():
            if isinstance(module, FactoredExperts):
                module.precompose(model.dtype)


def _offloaded(config: Any, directory: Path, offload: str) -> Any:
    """The configuration, with where left factors are to stay beside what it says of factors."""
    told = getattr(config, "quantization_config", None)
    if not isinstance(told, dict):
        raise UsageError(f"{directory}: not factored; use transformers to load it")
    config.quantization_config = {**told, "offload": offload}
    return config


def _require_bits(bits: int) -> None:
    if type(bits) is not int or bits not in (16, 8):
        raise UsageError(f"cache_bits is {bits!r}; expected 16 or 8")
