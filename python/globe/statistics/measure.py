"""Windows of a text through a checkpoint, layer by layer, and the statistics of its experts to a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from globe._version import __version__
from globe.compute import ranks
from globe.errors import GlobeError, UsageError
from globe.runs.stages import Stages
from globe.statistics.calibration import TOKENS, Calibration, LayerStatistics, load_calibration, save_calibration
from globe.statistics.fisher import Fisher, fisher, spread
from globe.statistics.handed import Arguments
from globe.statistics.layerwise import Layerwise, NotFinite, own_code
from globe.statistics.manner import NOT_ASKED, Manner
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
                "builds it, but not in both; calibration cannot read them: use --calibrate none"
            )
    last = max(with_experts)
    layers = {}
    with stages.stage("calibrate", last + 1) as advance, own_code(checkpoint):
        for number, statistics in _stream(streamed, list(map(_mine, reading.parts)), last, manner):
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
    some, why_not = spread(reading.parts, manner.fisher.tokens), manner.fisher.why_not
    if why_not is None:
        found, why_not = _fisher(streamed, [_mine(part)[0] for part in some], path.parent, stages)
        layers |= {number: each.beside(layers[number]) for number, each in found.items()}
    if why_not is not None and manner.fisher != NOT_ASKED:
        stages.display.log(f"errors are weighed beside the residual stream, without Fisher information: {why_not}")
    about["fisher"] = {"tokens": 0 if why_not else sum(part.numel() for part in some), "none": why_not}
    tokens = dict(zip(TOKENS, (reading.windows, reading.samples, reading.held_out), strict=True))
    there = {name: ids for name, ids in tokens.items() if ids is not None and len(ids) > 0}
    ranks.lead(lambda: save_calibration(path, layers, about, there))
    ranks.seen(path)
    return load_calibration(path)


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


def _mine(windows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The windows that are dealt to this rank, and the number of the first of them."""
    first, last = (len(windows) * (ranks.rank() + end) // ranks.size() for end in (0, 1))
    return (windows[first:last], first) if ranks.size() > 1 else (windows, 0)


def _stream(
    streamed: Layerwise, parts: list[tuple[torch.Tensor, int]], last: int, manner: Manner
) -> Iterator[tuple[int, LayerStatistics | None]]:
    """The statistics of one layer after another, None where it has no experts.

    A part are windows of one length, of this rank, with the number of the first.
    """
    states = [(*streamed.embed(windows), first) for windows, first in parts if len(windows)]
    for number in range(last + 1):
        if number < last:
            streamed.expect(number + 1)
        yield number, _pass(streamed, number, states, manner)


def _pass(
    streamed: Layerwise, number: int, states: list[tuple[torch.Tensor, Arguments, int]], manner: Manner
) -> LayerStatistics | None:
    """Let all windows through a layer, in place."""
    with streamed.layer(number) as layer:
        module = streamed.experts(number)
        if module is None:
            for hidden, arguments, _ in states:
                for span in streamed.batches(hidden):
                    hidden[span] = streamed.run(number, layer, hidden, arguments, span)
            return None
        experts = layer_experts(streamed, module)
        count, d, p = experts.down.shape
        moments = Moments(count, d, p, manner.kept, manner.own.directions)
        with in_place_of(module, experts, streamed) as calls:
            for hidden, arguments, first in states:
                for span in streamed.batches(hidden):
                    hidden[span] = streamed.run(number, layer, hidden, arguments, span)
                    place = (first + span.start) * hidden.shape[1]
                    moments.add(calls.pop(), hidden[span].flatten(0, 1).flatten(1), place)
        return moments.over_ranks().statistics(experts.down)


def _fisher(
    streamed: Layerwise, parts: list[torch.Tensor], folder: Path, stages: Stages
) -> tuple[dict[int, Fisher], str | None]:
    """The Fisher information of all layers, or why it cannot be had."""
    try:
        return fisher(streamed, parts, folder, stages), None
    except NotFinite:
        raise
    except GlobeError as error:
        return {}, str(error)


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
