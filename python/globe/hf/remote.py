"""What `auto_map` in a factored directory's config.json leads to, for `trust_remote_code=True`."""

from __future__ import annotations

import importlib
from typing import Any

import globe.hf  # noqa: F401  (registers the quantizer)
from globe.errors import GlobeError


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
    transformers = importlib.import_module("transformers")
    names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in names:
        raise GlobeError(f"this transformers has no causal language model of type {config.model_type!r}; update it")
    return getattr(transformers, names[config.model_type])
