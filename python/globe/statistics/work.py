"""What a calibration has to do, and the sampling before it, from headers alone."""

from __future__ import annotations

import math

from globe.checkpoint.index import Checkpoint
from globe.settings import Settings
from globe.sizes.budget import memory_limit
from globe.sizes.own import own_directions
from globe.sizes.work import Work
from globe.statistics.fisher import TOKENS
from globe.statistics.layerwise import LAYER
from globe.statistics.mixture import AUTO, MEASURED, SELF, tokens_for
from globe.statistics.own import AT_ONCE, LENGTH, MOST
from globe.statistics.row_moments import moments_for
from globe.statistics.sampling_memory import sampling_bytes
from globe.statistics.windows import WINDOW

_SHRUNK = 6  # d³ operations of whitening an expert's own moment in halves, and of its leading directions


def calibration_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of letting all tokens through the layers up to the last one with experts; nothing where a file has it already."""
    if settings.calibrate not in MEASURED:
        return Work()
    gates = checkpoint.leading
    tokens, experts = tokens_for(settings, gates.d), gates.layers * choices(checkpoint)
    kept = len(moments_for(settings.families, gates)) * experts * 2 * gates.p * gates.p
    own = 0.0
    if experts < len(gates) and own_directions(len(gates), gates.d):
        own = experts * 5 * gates.d * gates.d / 4
    flops = tokens * (gates.layers * 5 * gates.d * gates.d / 4 + kept + own)
    flops += len(gates) * _SHRUNK * gates.d**3 if own else 0
    summed = Work(flops=flops, calls=len(gates))
    return stream_work(checkpoint, tokens) + summed


def choices(checkpoint: Checkpoint) -> int:
    """Experts that a token is sent to; all of a layer where the configuration does not tell."""
    gates, found = checkpoint.leading, checkpoint.config.get("num_experts_per_tok")
    return found if isinstance(found, int) else len(gates) // gates.layers


def stream_work(checkpoint: Checkpoint, tokens: int) -> Work:
    """Of letting so many tokens through the layers up to the last one with experts."""
    gates = checkpoint.leading
    p, d, last = gates.p, gates.d, max(expert.layer for expert in gates.experts)
    routed = {expert.tensor for name in checkpoint.layout.families for expert in checkpoint.family(name).experts}
    beside = read = 0
    for name, info in checkpoint.decoded.items():
        match = LAYER.match(name)
        if match is not None and int(match["layer"]) <= last:
            read += info.nbytes
            beside += 0 if name in routed else math.prod(info.shape)
    experts = gates.layers * choices(checkpoint)
    attention = 4 * (last + 1) * WINDOW * d
    flops = tokens * (2 * beside + 6 * experts * p * d + attention)
    moved = 4 * tokens * (12 * (last + 1) * d + experts * (16 * p + 4 * d)) + 3 * read
    return Work(flops=flops, moved=moved, read=read)


def fisher_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of the Fisher information: tokens once forwards and once back, which takes the way forwards again."""
    if settings.calibrate not in MEASURED or settings.metric != "fisher":
        return Work()
    gates = checkpoint.leading
    tokens = min(TOKENS, tokens_for(settings, gates.d))
    beside = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if LAYER.match(name) is None)
    kept = 2 * (gates.layers + 1) * tokens * gates.d * 4
    back = stream_work(checkpoint, tokens) * 4 + Work(flops=6.0 * tokens * beside, read=kept, written=kept)
    return back + Work(flops=tokens * gates.layers * (choices(checkpoint) * 2 * gates.p + 5 * gates.d / 4) * gates.d)


def sampling_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of the model's own samples; nothing where there are none, or `auto` has no memory for the whole model."""
    if settings.calibrate not in (AUTO, SELF):
        return Work()
    gates = checkpoint.leading
    share = 0.5 if settings.calibrate == AUTO else 1.0
    tokens = round(1.25 * share * tokens_for(settings, gates.d))  # a quarter is held out
    sequences = -(-tokens // LENGTH)
    whole = sampling_bytes(checkpoint, min(sequences, AT_ONCE), LENGTH) <= memory_limit(settings)
    if not whole and settings.calibrate == AUTO:
        return Work()
    at_once = AT_ONCE if whole else MOST
    routed = {expert.tensor for name in checkpoint.layout.families for expert in checkpoint.family(name).experts}
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.decoded.items()}
    chosen = 3 * gates.layers * choices(checkpoint) * gates.p * gates.d
    active = sum(size for name, size in sizes.items() if name not in routed) + chosen
    steps = -(-sequences // at_once) * LENGTH
    read = sum(info.nbytes for info in checkpoint.tensors.values()) * (1 if whole else steps)
    moved = 4.0 * steps * sum(sizes.values()) + 3 * read
    return Work(flops=2.0 * tokens * active, moved=moved, read=read, calls=40 * steps * gates.layers)
