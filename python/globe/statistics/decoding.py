"""Keys and values of a model that writes many sequences at once, with room for all of them from the start."""

from __future__ import annotations

from typing import Any

import torch


class _Room:
    """Room for a layer's keys or values (n, heads, length, width), of which the first tokens are there."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.held: torch.Tensor | None = None

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Put more tokens behind those that are there, and give all."""
        if self.held is None:
            self.held = states.new_empty(*states.shape[:2], self.length, states.shape[3])
        last = self.filled + states.shape[2]
        self.held[:, :, self.filled : last] = states
        self.filled = last
        return self.held[:, :, :last]


def decoding_cache(config: Any, length: int) -> Any:
    """A cache of transformers for `length` tokens whose plain layers never move what they hold.

    Layers of other kinds (sliding windows, linear attention) stay as transformers makes them.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            _make_room(layer, length)
    return cache


def _make_room(layer: Any, length: int) -> None:
    keys, values = _Room(length), _Room(length)

    def update(
        key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        layer.keys, layer.values = keys.take(key_states), values.take(value_states)
        return layer.keys, layer.values

    layer.update = update
