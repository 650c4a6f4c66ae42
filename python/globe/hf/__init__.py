"""Factored checkpoints in transformers: importing this registers quantizer "globe" with `from_pretrained`."""

from __future__ import annotations

try:
    from transformers.quantizers import HfQuantizer
except ImportError as error:
    raise ImportError("globe.hf needs transformers: pip install 'globe-moe[hf]'") from error
if not hasattr(HfQuantizer, "get_new_dtype"):
    raise ImportError("globe.hf needs transformers 5.21 or later: pip install -U 'globe-moe[hf]'")

from globe.hf.cache import CacheStats, MixtureCache
from globe.hf.experts import FactoredExperts
from globe.hf.load import load, set_cache
from globe.hf.quantizer import GlobeConfig, GlobeQuantizer

__all__ = ["CacheStats", "FactoredExperts", "GlobeConfig", "GlobeQuantizer", "MixtureCache", "load", "set_cache"]
