"""What a calibration has to do, and the sampling before it, from headers alone."""

from __future__ import annotations

import math

from globe.checkpoint.index import Checkpoint
from globe.settings import Settings
from globe.sizes.budget import memory_limit
from globe.sizes.own import own_directions
from globe.sizes.work import Work
from globe.statistics.layerwise import LAYER
from globe.statistics.mixture import AUTO, MEASURED, SELF, tokens_for
from globe.statistics.own import AT_ONCE, LENGTH
from globe.statistics.row_moments import moments_for
from globe.statistics.sampling_memory import sampling_bytes
from globe.statistics.windows import WINDOW

_SHRUNK = 6  # d³ operations of whitening an expert's own moment in halves, and of its leading directions


def calibration_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of letting all tokens through the layers up to the last one with experts; nothing where a file has it already."""
    if settings.calibrate not in MEASURED:
        return Work()
    gates = checkpoint.family("gate")
    tokens = tokens_for(settings, gates.d)
    p, d, last = gates.p, gates.d, max(expert.layer for expert in gates.experts)
    routed = {expert.tensor for name in ("gate", "up", "down") for expert in checkpoint.family(name).experts}
    beside = read = 0
    for name, info in checkpoint.tensors.items():
        match = LAYER.match(name)
        if match is not None and int(match["layer"]) <= last:
            read += info.nbytes
            beside += 0 if name in routed else math.prod(info.shape)
    choices = checkpoint.config.get("num_experts_per_tok")
    chosen = choices if isinstance(choices, int) else len(gates) // gates.layers
    experts = gates.layers * chosen
    kept = len(moments_for(settings.families, gates)) * experts * 2 * p * p
    own = 0.0
    if chosen < len(gates) // gates.layers and own_directions(len(gates), d):
        own = experts * 5 * d * d / 4
    attention = 4 * (last + 1) * WINDOW * d
    flops = tokens * (2 * beside + 6 * experts * p * d + attention + gates.layers * 5 * d * d / 4 + kept + own)
    flops += len(gates) * _SHRUNK * d**3 if own else 0
    moved = 4 * tokens * (12 * (last + 1) * d + experts * (16 * p + 4 * d)) + 3 * read
    return Work(flops=flops, moved=moved, read=read, calls=len(gates))


def sampling_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of the model's own samples; nothing where there are none, or where there is no memory for the whole model."""
    if settings.calibrate not in (AUTO, SELF):
        return Work()
    gates = checkpoint.family("gate")
    share = 0.5 if settings.calibrate == AUTO else 1.0
    tokens = round(1.25 * share * tokens_for(settings, gates.d))  # a quarter is held out
    if sampling_bytes(checkpoint, min(tokens, AT_ONCE * LENGTH)) > memory_limit(settings):
        return Work()
    routed = {expert.tensor for name in ("gate", "up", "down") for expert in checkpoint.family(name).experts}
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    choices = checkpoint.config.get("num_experts_per_tok")
    chosen = choices if isinstance(choices, int) else len(gates) // gates.layers
    active = (
        sum(size for name, size in sizes.items() if name not in routed) + 3 * gates.layers * chosen * gates.p * gates.d
    )
    steps = -(-tokens // (AT_ONCE * LENGTH)) * LENGTH
    read = sum(info.nbytes for info in checkpoint.tensors.values())
    moved = 4.0 * steps * sum(sizes.values()) + 3 * read
    return Work(flops=2.0 * tokens * active, moved=moved, read=read, calls=40 * steps * gates.layers)
