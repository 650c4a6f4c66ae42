"""Windows of a text through a checkpoint, layer by layer, and the statistics of its experts to a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from globe._version import __version__
from globe.errors import GlobeError, UsageError
from globe.runs.stages import Stages
from globe.statistics.calibration import TOKENS, Calibration, LayerStatistics, save_calibration
from globe.statistics.handed import Arguments
from globe.statistics.layerwise import Layerwise, own_code
from globe.statistics.manner import Manner
from globe.statistics.moments import Moments
from globe.statistics.stand_in import in_place_of, layer_experts
from globe.statistics.windows import Reading


def measure(reading: Reading, manner: Manner, path: Path, stages: Stages) -> Calibration:
    """Let all windows through the layers up to the last one with experts, and write their statistics.

    Raises
    ------
    UsageError
        If the file cannot be at its place.
    GlobeError
        If the checkpoint cannot be run, or its experts are not of the form that is known.
    """
    require_place(path)
    checkpoint, gates = reading.checkpoint, reading.checkpoint.leading
    streamed = Layerwise(checkpoint, manner.device, reading.trust_remote_code, manner.precision)
    with own_code(checkpoint):
        known = streamed.model.get_input_embeddings().num_embeddings
    largest = max(int(part.max()) for part in reading.parts)
    if largest >= known:
        raise GlobeError(f"the tokenizer gives token {largest}, the model knows {known}; it is of another model")
    with_experts = {expert.layer for expert in gates.experts}
    for number in range(len(streamed.layers)):
        if (streamed.experts(number) is not None) != (number in with_experts):
            raise GlobeError(
                f"{checkpoint.directory}: layer {number} has routed experts in its weight files or as transformers "
                "builds it, but not in both; calibration cannot read them"
            )
    last = max(with_experts)
    with stages.stage("calibrate", last + 1) as advance:
        layers = {}
        with own_code(checkpoint):
            for number, statistics in _stream(streamed, reading.parts, last, manner):
                if statistics is not None:
                    layers[number] = statistics
                advance(1)
        warnings = _warnings(layers, reading.about["tokens"], gates.d)
        for line in warnings:
            stages.display.log(line)
        own = _own_report(layers, manner)
        stages.display.log(own["text"])
        about = {
            **reading.about,
            "globe_version": __version__,
            "device": str(manner.device),
            "products": products(reading, manner),
            "own_moments": own,
            "warnings": warnings,
        }
        tokens = dict(zip(TOKENS, (reading.windows, reading.samples, reading.held_out), strict=True))
        there = {name: ids for name, ids in tokens.items() if ids is not None and len(ids) > 0}
        return save_calibration(path, layers, about, there)


def require_place(path: Path) -> None:
    """Refuse a name that a calibration file cannot have.

    Raises
    ------
    UsageError
        If its folder is not there, or it is one itself.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such directory; expected a place for the calibration file")
    if path.is_dir():
        raise UsageError(f"{path}: is a directory; expected a name for the calibration file")


def products(reading: Reading, manner: Manner) -> str:
    """What a file says of the dtype that layers run in."""
    dtype = Layerwise.working_dtype(reading.checkpoint.leading.dtype, manner.device, manner.precision)
    return str(dtype).removeprefix("torch.")


def _stream(
    streamed: Layerwise, parts: list[torch.Tensor], last: int, manner: Manner
) -> Iterator[tuple[int, LayerStatistics | None]]:
    """The statistics of one layer after another, None where it has no experts; a part's windows are of one length."""
    states = [streamed.embed(windows) for windows in parts]
    for number in range(last + 1):
        if number < last:
            streamed.expect(number + 1)
        yield number, _pass(streamed, number, states, manner)


def _pass(
    streamed: Layerwise, number: int, states: list[tuple[torch.Tensor, Arguments]], manner: Manner
) -> LayerStatistics | None:
    """Let all windows through a layer, in place."""
    with streamed.layer(number) as layer:
        module = streamed.experts(number)
        if module is None:
            for hidden, arguments in states:
                for span in streamed.batches(hidden):
                    hidden[span] = streamed.run(number, layer, hidden, arguments, span)
            return None
        experts = layer_experts(streamed, module)
        count, d, p = experts.down.shape
        moments = Moments(count, d, p, manner.kept, manner.own.directions)
        with in_place_of(module, experts, streamed) as calls:
            for hidden, arguments in states:
                for span in streamed.batches(hidden):
                    hidden[span] = streamed.run(number, layer, hidden, arguments, span)
                    moments.add(calls.pop(), hidden[span].flatten(0, 1).flatten(1), span.start * hidden.shape[1])
        return moments.statistics(experts.down)


def _own_report(layers: dict[int, LayerStatistics], manner: Manner) -> dict[str, Any]:
    """How many experts have a moment of their own, and how many have their layer's; and that in words."""
    count = sum(len(found.counts) for found in layers.values())
    own = sum(int(found.own_values.any(1).sum()) for found in layers.values() if found.own_values is not None)
    kept = manner.own.directions
    if kept == 0:
        text = f"experts have their layer's moments, and of their own the diagonals: {manner.own.why_not}"
    else:
        text = f"own moments of {own} of {count} experts, in {kept} directions each"
        if own < count:
            text += f"; {count - own} have their layer's: no tokens, or halves of them that agree on nothing else"
    return {"directions": kept, "own": own, "as_layer": count - own, "text": text}


def _warnings(layers: dict[int, LayerStatistics], tokens: int, d: int) -> list[str]:
    lines = []
    if tokens < 4 * d:
        lines.append(f"{tokens:,} tokens are few for moments of {d} inputs; at least {4 * d:,} are advised")
    unused = [
        (layer, expert) for layer, found in layers.items() for expert in (found.counts == 0).nonzero()[:, 0].tolist()
    ]
    if unused:
        layer, expert = unused[0]
        total = sum(len(found.counts) for found in layers.values())
        lines.append(f"{len(unused)} of {total} experts were sent no token, first expert {expert} of layer {layer}")
    return lines
