"""Whether sampling from a model fits in memory, from the headers of its checkpoint alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from globe.checkpoint.index import Checkpoint
from globe.sizes.budget import BASE
from globe.statistics.layerwise import LAYER

_LOGITS = 24  # bytes of a sequence and a token of the vocabulary: logits, probabilities, their sums in fp64
_STACKING = 4  # stacks of a layer's experts as stored, beside its weights, while it is loaded


def sampling_bytes(checkpoint: Checkpoint, sequences: int, length: int, width: int = 4, whole: bool = True) -> int:
    """Peak memory of sampling sequences at once: weights in numbers of `width` bytes, keys and values, logits.

    Of all weights, or without `whole` of those of the largest layer and what is in none.
    """
    config: dict[str, Any] = checkpoint.config.get("text_config") or checkpoint.config
    gates = checkpoint.leading
    weights = _weights(checkpoint, whole) * width
    layers = int(config.get("num_hidden_layers") or gates.layers)
    kept = 2 * layers * max(gates.d, _heads_width(config)) * sequences * length * width
    stacking = _STACKING * gates.bytes_per_weight * len(gates) * gates.p * gates.d // gates.layers
    return BASE + weights + kept + stacking + _LOGITS * sequences * int(config.get("vocab_size") or 0)


def _weights(checkpoint: Checkpoint, whole: bool) -> int:
    layers: Counter[str] = Counter()
    for name, info in checkpoint.decoded.items():
        match = LAYER.match(name)
        layers[match["layer"] if match is not None else ""] += math.prod(info.shape)
    if whole:
        return sum(layers.values())
    beside = layers.pop("", 0)
    return beside + max(layers.values(), default=0)


def _heads_width(config: dict[str, Any]) -> int:
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    width = config.get("head_dim") or 0
    return int(heads) * int(width) if isinstance(heads, int) and isinstance(width, int) else 0
