"""Whether calibration fits in memory, from the headers of a checkpoint alone."""

from __future__ import annotations

import math

import torch

from globe.checkpoint.index import Checkpoint
from globe.compute.devices import device_room
from globe.errors import UsageError
from globe.settings import Settings
from globe.sizes.budget import BASE, memory_limit, size_text
from globe.sizes.own import own_directions
from globe.statistics.experts import FACTORS
from globe.statistics.fisher import LOGITS, TOKENS
from globe.statistics.layerwise import LAYER, TOKENS_AT_ONCE
from globe.statistics.manner import FisherPlan, OwnPlan
from globe.statistics.mixture import MEASURED, tokens_for
from globe.statistics.row_moments import moments_for
from globe.statistics.windows import WINDOW

_STACKING = 4  # stacks of an expert's matrix, as stored, beside the layer's weights while they are loaded
_ESTIMATES = 12  # d × d matrices in hand while an expert's own moment is shrunk
_OF_LOGITS = 6  # in fp32: they, their exponentials and gradients
COPIES = 3  # of all tokens for every expert, where transformers makes such: before and behind weights, and outputs
ACTIVATIONS = 16  # of a token, each as wide as the widest side of an expert


def require_memory(checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse to measure what would not fit below `max_memory`.

    Raises
    ------
    UsageError
        Says what would.
    """
    if settings.calibrate not in MEASURED:
        return
    gates = checkpoint.leading
    kept, tokens = moments_for(settings.families, gates), tokens_for(settings, gates.d)
    limit, needed = memory_limit(settings), calibration_bytes(checkpoint, tokens, len(kept))
    if needed > limit:
        raise UsageError(
            f"max_memory is {size_text(limit)}; calibration needs about {size_text(needed)}: use --max-memory "
            f"{size_text(needed)}, a file of globe calibrate (--calibrate FILE), or --calibrate none"
        )


def own_plan(checkpoint: Checkpoint, tokens: int, kept_moments: int, limit: int, device: torch.device) -> OwnPlan:
    """Whether the experts' own moments are gathered: where routing makes them differ, and there is memory.

    Parameters
    ----------
    checkpoint : Checkpoint
    tokens, kept_moments
        As for `calibration_bytes`.
    limit : int
        Bytes that the process may take.
    device : torch.device
        Where layers run, which is where the sums are.
    """
    gates = checkpoint.leading
    each, choices = len(gates) // gates.layers, checkpoint.text_config.get("num_experts_per_tok")
    if isinstance(choices, int) and choices >= each:
        return OwnPlan(0, "every token goes to all experts of its layer")
    kept, room = own_directions(len(gates), gates.d), device_room(device)
    needed, there = calibration_bytes(checkpoint, tokens, kept_moments, kept), 8 * each * gates.d**2
    if kept == 0 or needed > limit:
        return OwnPlan(0, f"they need about {size_text(needed)} of memory, and {size_text(limit)} may be used")
    if room is not None and there > room // 2:
        return OwnPlan(0, f"they need {size_text(there)} on {device}, which has {size_text(room)} free for all")
    return OwnPlan(kept)


def calibration_bytes(checkpoint: Checkpoint, tokens: int, kept_moments: int = 0, own: int = 0) -> int:
    """Peak memory of a calibration in float32: a layer, the states of all tokens, statistics of all layers.

    `kept_moments` of the p × p kinds of every expert are among the statistics, and `own` directions of its own moment.
    """
    gates = checkpoint.leading
    count, p, d = len(gates), gates.p, gates.d
    layers = len({expert.layer for expert in gates.experts})
    embedding, layer = embedding_bytes(checkpoint), layer_bytes(checkpoint)
    kept = layers * d * d + count * (d + 3 * p) + kept_moments * count * p * p
    sums = 4 * (2 * count // layers + _ESTIMATES * torch.get_num_threads()) * d * d if own else 0
    summed = 4 * kept // layers  # fp64, and its symmetric part
    choices = checkpoint.config.get("num_experts_per_tok")  # of a token; at most all experts of the layer
    pair = (choices if isinstance(choices, int) else count // layers) * (FACTORS * p + d)
    pair += COPIES * copies(checkpoint) * d
    activations = 4 * min(tokens, TOKENS_AT_ONCE) * (ACTIVATIONS * max(p, d) + pair)
    stored = kept + own * count * d
    return BASE + 4 * tokens * d + max(embedding, layer + 4 * summed + activations + sums) + 4 * stored


def fisher_plan(checkpoint: Checkpoint, tokens: int, limit: int) -> FisherPlan:
    """From how many of a calibration's tokens the Fisher information is found: none where there is no memory."""
    some = min(tokens, TOKENS)
    needed = fisher_bytes(checkpoint, some)
    if needed > limit:
        return FisherPlan(0, f"it needs about {size_text(needed)} of memory, and {size_text(limit)} may be used")
    return FisherPlan(some)


def fisher_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Peak memory of finding the Fisher information in float32, beside as much of a calibration as stays.

    The states of all tokens and their gradient; a layer with what differentiating it keeps of 4,096 tokens, or what
    lies beside the layers with the logits of as many as are in hand.
    """
    gates, config = checkpoint.leading, checkpoint.text_config
    count, p, d = len(gates), gates.p, gates.d
    choices = config.get("num_experts_per_tok")
    pair = (choices if isinstance(choices, int) else count // gates.layers) * (FACTORS * p + d)
    pair = max(pair, copies(checkpoint) * (FACTORS * p + COPIES * d))
    differentiated = 4 * min(tokens, TOKENS_AT_ONCE) * (2 * ACTIVATIONS * max(p, d) + 3 * pair)
    vocabulary = config.get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else _weights(checkpoint).get(None, 0) // d
    logits = 4 * _OF_LOGITS * max(LOGITS, WINDOW * vocabulary)
    stored = 2 * gates.layers * d * d + count * (d + 5 * p)
    held = max(embedding_bytes(checkpoint) + logits, layer_bytes(checkpoint) + differentiated + 8 * d * d)
    return BASE + 8 * tokens * d + 4 * stored + held


def copies(checkpoint: Checkpoint) -> int:
    """Of how many experts transformers gives each all tokens of a call: of a layer's, or none."""
    gates = checkpoint.leading
    return len(gates) // gates.layers if checkpoint.layout.copies else 0


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Of the largest layer in float32 while it is loaded: its weights as stored, and stacks of its experts."""
    gates = checkpoint.leading
    weights = {key: count for key, count in _weights(checkpoint).items() if key is not None}
    width, experts = gates.bytes_per_weight, len(gates) // len({expert.layer for expert in gates.experts})
    return (4 + width) * max(weights.values(), default=0) + _STACKING * width * experts * gates.p * gates.d


def embedding_bytes(checkpoint: Checkpoint) -> int:
    """Of what lies beside the layers, in float32 while it is loaded."""
    return (4 + checkpoint.leading.bytes_per_weight) * _weights(checkpoint).get(None, 0)


def _weights(checkpoint: Checkpoint) -> dict[int | None, int]:
    """Weights of every layer, and under None of all that lies beside the layers."""
    found: dict[int | None, int] = {}
    for name, info in checkpoint.decoded.items():
        match = LAYER.match(name)
        key = int(match["layer"]) if match is not None else None
        found[key] = found.get(key, 0) + math.prod(info.shape)
    return found
