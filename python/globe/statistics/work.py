"""What a calibration has to do, from headers alone."""

from __future__ import annotations

import math

from globe.checkpoint.index import Checkpoint
from globe.settings import Settings
from globe.sizes.work import Work
from globe.statistics.layerwise import LAYER
from globe.statistics.row_moments import moments_for
from globe.statistics.windows import WINDOW


def calibration_work(checkpoint: Checkpoint, settings: Settings) -> Work:
    """Of letting all tokens through the layers up to the last one with experts; nothing where a file has it already."""
    if settings.calibrate not in ("auto", "pydoc"):
        return Work()
    gates, tokens = checkpoint.family("gate"), settings.calibration_tokens
    p, d, last = gates.p, gates.d, max(expert.layer for expert in gates.experts)
    routed = {expert.tensor for name in ("gate", "up", "down") for expert in checkpoint.family(name).experts}
    beside = read = 0
    for name, info in checkpoint.tensors.items():
        match = LAYER.match(name)
        if match is not None and int(match[1]) <= last:
            read += info.nbytes
            beside += 0 if name in routed else math.prod(info.shape)
    choices = checkpoint.config.get("num_experts_per_tok")
    chosen = choices if isinstance(choices, int) else len(gates) // gates.layers
    experts = gates.layers * chosen
    kept = len(moments_for(settings.families, gates)) * experts * 2 * p * p
    attention = 4 * (last + 1) * WINDOW * d
    flops = tokens * (2 * beside + 6 * experts * p * d + attention + gates.layers * 5 * d * d / 4 + kept)
    moved = 4 * tokens * (12 * (last + 1) * d + experts * (16 * p + 4 * d)) + 3 * read
    return Work(flops=flops, moved=moved, read=read, calls=len(gates))
