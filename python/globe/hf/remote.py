"""What `auto_map` in a factored directory's config.json leads to, for `trust_remote_code=True`."""

from __future__ import annotations

import importlib
from typing import Any

import globe.hf  # noqa: F401  (registers the quantizer)
from globe.errors import GlobeError

_GIVES_TEXT = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


class GlobeModelConfig:
    """The architecture's own configuration, for programs that look at `quantization_config` before any model."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load it."""
        transformers = importlib.import_module("transformers")
        return transformers.AutoConfig.from_pretrained(*arguments, **{**options, "trust_remote_code": False})

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to register: what is loaded is of its own class."""


class GlobeForCausalLM:
    """The architecture's own class of transformers, which the quantizer makes load factored experts."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, config: Any, **options: Any) -> Any:
        """Load the model."""
        return _own_class(config).from_pretrained(*arguments, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        return _own_class(config)._from_config(config, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to register: saved models are of their own class."""


def _own_class(config: Any) -> Any:
    """By transformers' own tables: where this file's class is loaded by name, it is in those of its auto classes."""
    known = importlib.import_module("transformers.models.auto.modeling_auto")
    tables = (getattr(known, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}) for kind in _GIVES_TEXT)
    name = next((table[config.model_type] for table in tables if config.model_type in table), None)
    if name is None:
        raise GlobeError(f"this transformers has no model that gives text of type {config.model_type!r}; update it")
    return getattr(importlib.import_module("transformers"), name)
