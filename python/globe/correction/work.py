"""What corrections have to do and to hold in memory, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.correction.refit import WIDEST
from globe.correction.regression import RIDGES
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.sizes.work import Task, Work, lefts_work
from globe.statistics.calibration import load_calibration
from globe.statistics.experts import FACTORS
from globe.statistics.grams import UPPER
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


def down_rank(families: Mapping[str, Family], shapes: Mapping[str, Shape]) -> int | None:
    """The rank of the left factors of down; None where no pool holds it, so that it stays dense."""
    return next((shapes[name].rank for name, family in families.items() if "down" in family.families), None)


def corrected_bytes(checkpoint: Checkpoint, rank: int | None) -> int:
    """Of what corrections leave for writing: down of all layers, or its left factors of a rank."""
    down = checkpoint.family("down")
    return down.stored_bytes if rank is None else 2 * len(down) * down.p * rank


def correction_work(checkpoint: Checkpoint, tasks: Sequence[Task]) -> Work:
    """Of refitting `down` of all layers, with the pools that were fitted: two streams, composing, and regressions."""
    settings, gates = tasks[0].settings, checkpoint.leading
    tokens = corrected_tokens(checkpoint, settings)
    if tokens == 0:
        return Work()
    stream, composed = stream_work(checkpoint, tokens), Work()
    for task in tasks:
        n, p, d, r, _ = task.sizes
        solved = lefts_work(task)
        composed += replace(solved, flops=solved.flops + 2 * n * p * r * d, written=0.0)
    rank = next((task.shape.rank for task in tasks if "down" in task.family.families), None)
    regressed = _regressions(checkpoint, tokens, rank) * gates.layers
    written = corrected_bytes(checkpoint, rank)
    return stream * 2 + composed + regressed + Work(read=-stream.read, written=written)


def correction_bytes(checkpoint: Checkpoint, settings: Settings, rank: int | None) -> int:
    """Memory that corrections take beside what is there while factors are written; 0 where nothing is corrected.

    The states of both streams of all tokens; the layer in hand, with its experts as they were and composed, and the
    factors of its down if that has a rank; what the compressed experts saw of all tokens; and the sums of a regression
    with their factors.
    """
    tokens, gates = corrected_tokens(checkpoint, settings), checkpoint.leading
    if tokens == 0:
        return 0
    p, d, chosen, at_once = gates.p, gates.d, choices(checkpoint), min(tokens, TOKENS_AT_ONCE)
    experts = len(gates) // gates.layers
    (wide, outputs), size = _group(checkpoint, rank)[0], 4 * experts * p * d
    states = 2 * 4 * tokens * d
    seen = 4 * tokens * (chosen * (p + _NUMBERS) + d + 2)
    layer = layer_bytes(checkpoint) + 4 * size + 3 * size  # gate and up twice, down three times
    if rank is not None:
        layer += experts * rank * (2 * p + 4 * d)
    running = 4 * at_once * (ACTIVATIONS * max(p, d) + chosen * (FACTORS * p + d) + COPIES * copies(checkpoint) * d)
    sums = 8 * (2 * (wide * wide + wide * outputs) + 3 * wide * wide + 3 * wide * outputs)
    in_hand = seen + layer + max(running, sums + 4 * 4 * at_once * wide)
    return states + max(embedding_bytes(checkpoint), in_hand)


def _group(checkpoint: Checkpoint, rank: int | None) -> tuple[tuple[int, int], int, float]:
    """Of a regression: its inputs and outputs, how many there are in a layer, and the share of the tokens of one."""
    gates = checkpoint.leading
    experts = len(gates) // gates.layers
    together = min(experts, max(1, WIDEST // gates.p)) if rank is None else 1
    share = 1.0 - (1.0 - together / experts) ** choices(checkpoint)
    outputs = gates.d if rank is None else rank
    return (together * gates.p, outputs), math.ceil(experts / together), share


def _regressions(checkpoint: Checkpoint, tokens: int, rank: int | None) -> Work:
    """Of a layer: the sums, a Cholesky factor and its solution for every ridge, and what is left of the residuals.

    Of factors also the rows of their mixtures, residuals in these, and what they are of.
    """
    p, d = checkpoint.leading.p, checkpoint.leading.d
    (wide, outputs), count, share = _group(checkpoint, rank)
    given, batches = share * tokens, math.ceil(tokens / TOKENS_AT_ONCE)
    flops, moved = 2 * given * wide * (UPPER * wide + outputs + d), batches * 20 * wide * (wide + outputs)
    sums = Work(flops=flops, moved=4 * given * 8 * wide + moved)
    if rank is not None:
        rows = Work(wide=2 * rank * rank * d + rank**3, flops=2 * given * d * rank + 2 * p * rank * (rank + d))
        sums += rows
    ridge = Work(wide=wide**3 / 3 + 4 * wide * wide * outputs, moved=24 * wide * wide)
    return (sums + ridge * len(RIDGES)) * count
