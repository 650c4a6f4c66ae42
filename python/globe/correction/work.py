"""What corrections have to do and to hold in memory, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from globe.checkpoint.index import Checkpoint
from globe.correction.down import WIDEST
from globe.correction.regression import RIDGES
from globe.settings import Settings
from globe.sizes.work import Task, Work, lefts_work
from globe.statistics.calibration import load_calibration
from globe.statistics.experts import FACTORS
from globe.statistics.layerwise import TOKENS_AT_ONCE
from globe.statistics.memory import ACTIVATIONS, COPIES, copies, embedding_bytes, layer_bytes
from globe.statistics.mixture import MEASURED, tokens_for
from globe.statistics.work import choices, stream_work

_NUMBERS = 5  # of a pair of token and expert, as wide as two of fp32: its places and its weight


def corrected_tokens(checkpoint: Checkpoint, settings: Settings) -> int:
    """Tokens that corrections read: those of the calibration; 0 where nothing is corrected.

    Raises
    ------
    GlobeError
        If the setting `calibrate` names a file that is no calibration.
    """
    if settings.correct == "none" or settings.calibrate == "none":
        return 0
    if settings.calibrate in MEASURED:
        return tokens_for(settings, checkpoint.leading.d)
    return int(load_calibration(Path(settings.calibrate)).about["tokens"])


def correction_work(checkpoint: Checkpoint, tasks: Sequence[Task]) -> Work:
    """Of refitting `down` of all layers, with the pools that were fitted: two streams, composing, and regressions."""
    settings, gates = tasks[0].settings, checkpoint.leading
    tokens = corrected_tokens(checkpoint, settings)
    if tokens == 0:
        return Work()
    p, d, stream = gates.p, gates.d, stream_work(checkpoint, tokens)
    composed = Work()
    for task in tasks:
        n, _, _, r, _ = task.sizes
        solved = lefts_work(task)
        composed += replace(solved, flops=solved.flops + 2 * n * p * r * d, written=0.0)
    regressed = _regressions(checkpoint, tokens) * gates.layers
    return stream * 2 + composed + regressed + Work(read=-stream.read, written=checkpoint.family("down").stored_bytes)


def correction_bytes(checkpoint: Checkpoint, settings: Settings) -> int:
    """Memory that corrections take beside what is there while factors are written; 0 where nothing is corrected.

    The states of both streams of all tokens; the layer in hand, with its experts as they were and composed; what the
    compressed experts saw of all tokens; and the sums of a regression with their factors.
    """
    tokens, gates = corrected_tokens(checkpoint, settings), checkpoint.leading
    if tokens == 0:
        return 0
    p, d, chosen, at_once = gates.p, gates.d, choices(checkpoint), min(tokens, TOKENS_AT_ONCE)
    experts = len(gates) // gates.layers
    wide, size = _group(checkpoint)[0], 4 * experts * p * d
    states = 2 * 4 * tokens * d
    seen = 4 * tokens * (chosen * (p + _NUMBERS) + d + 2)
    layer = layer_bytes(checkpoint) + 4 * size + 3 * size  # gate and up twice, down three times
    running = 4 * at_once * (ACTIVATIONS * max(p, d) + chosen * (FACTORS * p + d) + COPIES * copies(checkpoint) * d)
    sums = 8 * (2 * (wide * wide + wide * d) + 3 * wide * wide + 3 * wide * d)
    in_hand = seen + layer + max(running, sums + 4 * 4 * at_once * wide)
    return states + max(embedding_bytes(checkpoint), in_hand)


def _group(checkpoint: Checkpoint) -> tuple[int, int, float]:
    """Of a regression: its inputs, how many there are in a layer, and the share of the tokens that one is given."""
    gates = checkpoint.leading
    experts = len(gates) // gates.layers
    together = min(experts, max(1, WIDEST // gates.p))
    share = 1.0 - (1.0 - together / experts) ** choices(checkpoint)
    return together * gates.p, math.ceil(experts / together), share


def _regressions(checkpoint: Checkpoint, tokens: int) -> Work:
    """Of a layer: the sums, a Cholesky factor and its solution for every ridge, and what is left of the residuals."""
    d, (wide, count, share) = checkpoint.leading.d, _group(checkpoint)
    given, batches = share * tokens, math.ceil(tokens / TOKENS_AT_ONCE)
    sums = Work(flops=2 * given * wide * (wide + 2 * d), moved=4 * given * 8 * wide + batches * 20 * wide * (wide + d))
    ridge = Work(wide=wide**3 / 3 + 4 * wide * wide * d, moved=24 * wide * wide)
    return (sums + ridge * len(RIDGES)) * count
