"""How much the distribution of the next token minds errors of the experts: Fisher information, layer by layer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from globe.compute import ranks
from globe.compute.passes import engine
from globe.errors import GlobeError
from globe.runs.stages import Stages
from globe.statistics.calibration import LayerStatistics
from globe.statistics.called import called
from globe.statistics.experts import Experts, Seen, row_blocks
from globe.statistics.grams import mirrored, upper_gram
from globe.statistics.layerwise import Layerwise, own_code
from globe.statistics.stand_in import layer_experts

TOKENS = 8192
LOGITS = 1 << 24  # at once, or those of one window


@dataclass(frozen=True)
class Fisher:
    """Fisher information of a layer's experts, means over all tokens.

    With t drawn from the model's own distribution q of the next token, KL(q‖q') is to second order ½ Σ_k E[δ_k²] ε_k²
    for errors ε_k that do not depend on each other, δ_k = ∂ log q(t)/∂ what is in error.

    Parameters
    ----------
    gate, up : torch.Tensor, shape (E, p)
        E[δ_k²] of the products gate x and up x of every expert; zero for tokens that it is not sent.
    output : torch.Tensor, shape (d, d)
        E[δ δᵀ] of the layer's output Σ_e w_e down_e h_e.
    counts : torch.Tensor of int64, shape (E,)
        Tokens that each expert is sent.
    """

    gate: torch.Tensor
    up: torch.Tensor
    output: torch.Tensor
    counts: torch.Tensor

    def over_ranks(self) -> Fisher:
        """The sums of what every rank has found of its tokens."""
        return Fisher(*map(ranks.summed, (self.gate, self.up, self.output, self.counts)))

    def beside(self, statistics: LayerStatistics) -> LayerStatistics:
        """A layer's statistics with these."""
        return replace(
            statistics,
            gate_fisher=self.gate,
            up_fisher=self.up,
            output_fisher=self.output,
            fisher_counts=self.counts,
        )


def fisher(streamed: Layerwise, parts: list[torch.Tensor], folder: Path, stages: Stages) -> dict[int, Fisher]:
    """The Fisher information of every layer with experts, by tokens that the model is made to draw.

    Windows pass through all layers, whose inputs are kept in a file without a name. At every place a token is drawn
    from the logits; the gradient of its log-probability goes back through the layers, each of which is loaded and run
    once more. One layer is in memory at a time.

    Parameters
    ----------
    streamed : Layerwise
    parts : list of torch.Tensor, each of shape (n, window)
        Token ids, of this rank.
    folder : Path
        Whose disk has room for the inputs of all layers.
    stages : Stages
        Shows it as stage ``fisher``.

    Returns
    -------
    dict
        By number of the layer. The same for the same windows on the same machine.

    Raises
    ------
    GlobeError
        If the disk has no room, or the model cannot be run, forwards or backwards.
    """
    depth, tokens = len(streamed.layers), int(ranks.summed_array(np.array([sum(part.numel() for part in parts)]))[0])
    found: dict[int, Fisher] = {}
    with stages.stage("fisher", 2 * depth) as advance, ranks.together(), own_code(streamed.checkpoint):
        paths = [_Path(streamed, windows, folder) for windows in parts if len(windows) > 0]
        for number in range(depth):
            streamed.expect(number + 1)
            with streamed.layer(number) as layer:
                for path in paths:
                    path.forwards(number, layer)
            advance(1)
        with streamed.ends() as model:
            for path in paths:
                path.turn(model)
        for number in reversed(range(depth)):
            streamed.expect(number - 1)
            with streamed.layer(number) as layer, _noting(streamed, number) as sums:
                for path in paths:
                    path.backwards(number, layer)
            if sums is not None:
                found[number] = sums.means(tokens)
            advance(1)
    return {number: each.over_ranks() for number, each in found.items()}


class _Path:
    """Windows (n, window) on their way through the layers and back: the inputs of all layers, and the gradient."""

    def __init__(self, streamed: Layerwise, windows: torch.Tensor, folder: Path) -> None:
        self._streamed, self._windows = streamed, windows
        self._state, self._arguments = streamed.embed(windows)
        if self._arguments.hands_on:
            raise GlobeError("layers hand one another more than the stream, whose gradient is not followed")
        self._kept = _scratch((len(streamed.layers), *self._state.shape), self._state.dtype, folder)

    def forwards(self, number: int, layer: Any) -> None:
        """Let all windows through a layer."""
        self._kept[number] = self._state
        for span in self._streamed.batches(self._windows):
            self._state[span] = self._streamed.run(number, layer, self._state, self._arguments, span)

    def turn(self, model: Any) -> None:
        """Draw tokens from the logits; from here on the state is the gradient of their −log q.

        A window's own tokens are the seed of what is drawn for it, wherever it is dealt to.
        """
        for span in _spans(self._windows, model):
            state = self._state[span].to(self._streamed.device).requires_grad_()
            with torch.enable_grad(), _passed(self._streamed.layers, state):
                logits = model(input_ids=self._windows[span].to(self._streamed.device), use_cache=False).logits
            q = logits.detach().float().softmax(-1)
            drawn = torch.cat([_drawn(*pair) for pair in zip(self._windows[span], q.cpu(), strict=True)]).to(q.device)
            q = q.flatten(0, 1)
            q.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=q.dtype))
            self._state[span] = torch.autograd.grad(logits, state, q.view(logits.shape).to(logits.dtype))[0].cpu()

    def backwards(self, number: int, layer: Any) -> None:
        """Take the gradient back through a layer."""
        for span in self._streamed.batches(self._windows):
            state = self._kept[number, span].to(self._streamed.device).requires_grad_()
            with torch.enable_grad():
                output = layer(state, **self._arguments.of(number, span))
            output = output[0] if isinstance(output, tuple) else output
            gradient = self._state[span].to(self._streamed.device)
            self._state[span] = torch.autograd.grad(output, state, gradient)[0].cpu()
        if not torch.isfinite(self._state).all():
            raise GlobeError(f"the gradient in front of layer {number} is not finite")


def _drawn(window: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A token (window, 1) for each place of a window, by probabilities q (window, vocabulary)."""
    seed = crc32(window.cpu().numpy().tobytes())
    return torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed))


class _Sums:
    """Sums over tokens of one layer, in fp64."""

    def __init__(self, experts: Experts) -> None:
        count, d, p = experts.down.shape
        self._down = experts.down
        self._squares = torch.zeros(count, 2, p, dtype=torch.float64)
        self._output = torch.zeros(d, d, dtype=torch.float64)
        self._counts = torch.zeros(count, dtype=torch.int64)

    def add(self, seen: Seen, gradient: torch.Tensor) -> None:
        """Take the gradient (n, d) of the layer's output."""
        gradient = gradient.float()
        self._output += upper_gram(gradient).cpu().double()
        routing = seen.routing

        def add(part: slice) -> None:
            for expert in range(part.start, part.stop):
                span = routing.spans[expert]
                self._counts[expert] += span.stop - span.start
                for rows in row_blocks(span.start, span.stop, gradient.device):
                    mine = gradient.index_select(0, routing.rows[rows]) * routing.weights[rows, None]
                    hidden = mine @ self._down[expert].float()
                    self._squares[expert] += (seen.factors[:2, rows] * hidden).square_().sum(1).cpu().double()

        with engine(gradient.device) as workers:
            workers.run(add, len(routing.spans))

    def means(self, tokens: int) -> Fisher:
        """The sums over the number of tokens."""
        gate, up = (self._squares / tokens).float().unbind(1)
        output = (mirrored(self._output) / tokens).float()
        return Fisher(gate.contiguous(), up.contiguous(), output, self._counts)


@contextmanager
def _noting(streamed: Layerwise, number: int) -> Iterator[_Sums | None]:
    """Sums of what goes back through a layer's experts, or None where it has none."""
    module = streamed.experts(number)
    if module is None:
        yield None
        return
    experts = layer_experts(streamed, module)
    if experts.form.finished is not None:
        raise GlobeError(f"{type(module).__name__} norms what down gives, through which the gradient is not followed")
    sums = _Sums(experts)

    def forward(hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            call = called(module, len(experts.down), *(part.detach() for part in (hidden_states, *routing)))
            _, seen = experts.run(call.inputs, call.chosen, call.weights)
        output: torch.Tensor = type(module).forward(module, hidden_states, *routing)
        output.register_hook(lambda gradient: sums.add(seen, call.own(gradient)))
        return output

    module.forward = forward
    try:
        yield sums
    finally:
        del module.forward


@contextmanager
def _passed(layers: Any, state: torch.Tensor) -> Iterator[None]:
    """Layers that hand on a state, in place of what the first of them is given."""

    def passed(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return state

    for layer in layers:
        layer.forward = passed
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _spans(windows: torch.Tensor, model: Any) -> list[slice]:
    """Batches of windows whose logits fit in memory together."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    size = max(1, LOGITS // (vocabulary * windows.shape[1]))
    return [slice(first, min(first + size, len(windows))) for first in range(0, len(windows), size)]


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor in a file without a name, which goes with it."""
    size = int(np.prod(shape)) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < size:
        raise GlobeError(
            f"{folder}: {free / 1e9:.2f} GB free, the inputs of all layers need {size / 1e9:.2f} GB for the Fisher "
            "information"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        raw = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
    return torch.from_numpy(raw).view(dtype).view(shape)


def spread(parts: list[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """About so many tokens of the windows of all parts, evenly taken."""
    step = max(1, sum(part.numel() for part in parts) // max(1, tokens))
    return [part[step // 2 :: step] if len(part) > step // 2 else part[:1] for part in parts]
