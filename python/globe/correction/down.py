"""`down` of every layer refitted to the original layer's output, on the stream that the compressed layers give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from globe.checkpoint.expert_module import expert_module
from globe.checkpoint.family import Expert
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import TORCH_DTYPES
from globe.correction.composed import compose_layer
from globe.correction.regression import Normal, regress
from globe.errors import GlobeError
from globe.fit.stored_lefts import Fit
from globe.runs.job import Job
from globe.statistics.calibration import Calibration
from globe.statistics.experts import Experts, Seen
from globe.statistics.handed import Arguments
from globe.statistics.layerwise import Layerwise
from globe.statistics.stand_in import in_place_of, layer_experts

CORRECTED = "corrected-"  # and the layer: the name of a result in a job's store
WIDEST = 2048  # inputs of one regression: experts are refitted together while theirs are no more
_HELD = 4  # every so many windows one is held out
_LINEAR = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}  # of the experts' part: rounding of the stream


@dataclass(frozen=True)
class Corrected:
    """What a layer's correction came to, on the windows held out: Σ‖r‖² before and after, and the ridges taken.

    r is the original layer's output less the compressed one's, over the former's size, of every token.
    """

    layer: int
    before: float
    after: float
    ridges: list[float | None]


@dataclass(frozen=True)
class _Batch:
    """What the compressed experts saw of some windows, and r (n, d) with what it is weighed by (n, 1)."""

    seen: Seen
    residuals: torch.Tensor
    weights: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True)
class Corrections:
    """The layers that were corrected, and their tensors, each with the result in the job's store that has it."""

    layers: list[Corrected]
    tensors: dict[str, str]


def correction_text(calibration: Calibration | None, job: Job) -> list[torch.Tensor]:
    """The text to correct on, if that is asked for: the windows that the statistics are of, of one length each.

    Raises
    ------
    GlobeError
        If the statistics do not tell their windows.
    """
    if job.settings.correct == "none":
        return []
    if calibration is None:
        job.log("down is not corrected: there is no calibration")
        return []
    if not calibration.parts:
        raise GlobeError(
            f"calibration {calibration.path}: does not hold the windows that it read, which corrections need; run "
            "globe calibrate again, or use --correct none"
        )
    return calibration.parts


def correct(
    checkpoint: Checkpoint,
    fits: dict[str, Fit],
    text: list[torch.Tensor],
    job: Job,
    *,
    trust_remote_code: bool = False,
) -> Corrections | None:
    """Refit `down` of every layer with experts, and leave the tensors in the job's store; None without a text.

    Windows go through the original layers and through the compressed ones, a layer at a time. With x̂ the compressed
    stream, h the experts' hidden values on it, w the routing weights and y the original layer's output on the original
    stream, the changes Δ_e minimise Σ_t ‖y_t − ŷ_t − Σ_e w_te Δ_e h_te‖² / ‖y_t‖² + λ Σ_e ‖Δ_e‖² over three quarters
    of the windows; the last quarter chooses λ, or that nothing changes. Experts are refitted together as far as their
    widths sum to `WIDEST`, group after group where they are wider. The compressed stream goes on with the refitted
    `down` in the dtype that it is stored in.

    Parameters
    ----------
    checkpoint : Checkpoint
    fits : dict
        Pools of gate and up.
    text : list of torch.Tensor of int64, shape (n, window)
        Token ids, in windows of one length each.
    job : Job
        Its store gets `corrected-LAYER` with the layer's tensors under their own names; a run that is called again
        after all are there does nothing.
    trust_remote_code : bool
        As for `globe.calibrate`.

    Raises
    ------
    GlobeError
        If the checkpoint cannot be run, or its layers are not of a form that can be corrected so.
    """
    if not text:
        return None
    downs: dict[int, list[Expert]] = {}
    for expert in checkpoint.family("down").experts:
        downs.setdefault(expert.layer, []).append(expert)
    layers = _found_before(job, downs)
    if layers is None:
        streamed = Layerwise(checkpoint, job.device, trust_remote_code, job.settings.precision)
        with job.stages.stage("correct", max(downs) + 1) as advance:
            states = [_state(*streamed.embed(windows)) for windows in text]
            if any(state.original.hidden.dim() != 3 for state in states):
                job.log("down is not corrected: every token has several streams in this architecture")
                return None
            layers = []
            for found in _stream(streamed, states, downs, (fits, job)):
                layers += [found] if found is not None else []
                advance(1)
    places = {expert.tensor: _key(layer) for layer, experts in downs.items() for expert in experts}
    return Corrections(layers, places)


def _stream(
    streamed: Layerwise,
    states: list[_State],
    downs: Mapping[int, list[Expert]],
    made: tuple[dict[str, Fit], Job],
) -> Iterator[Corrected | None]:
    """Let both streams through the layers, as far as there are experts, each corrected before the next."""
    job, last = made[1], max(downs)
    for number in range(last + 1):
        if number < last:
            streamed.expect(number + 1)
        with streamed.layer(number) as layer:
            if number in downs:
                dtype = TORCH_DTYPES[downs[number][0].info.dtype]
                experts, result = _Step(streamed, number, layer, dtype).refit(states, made)
                told = {**asdict(result), "elapsed": job.stages.so_far()}
                job.store.save(_key(number), _stored(experts.down, downs[number]), told)
                yield result
            else:
                step = _Step(streamed, number, layer, streamed.dtype)
                for state, span in _spans(streamed, states):
                    for one in (state.original, state.compressed):
                        one.hidden[span] = step.through(one, span)
                yield None


def _key(layer: int | str) -> str:
    return f"{CORRECTED}{layer}"


def _found_before(job: Job, layers: Mapping[int, Any]) -> list[Corrected] | None:
    """What an earlier process corrected, if it came to the end."""
    metas = [job.store.check(_key(layer)) for layer in layers]
    whole = [meta for meta in metas if meta is not None]
    if not whole or len(whole) < len(metas):
        return None
    job.stages.recall(max((meta["elapsed"] for meta in whole), key=lambda record: float(record["seconds"])))
    return [Corrected(**{key: value for key, value in meta.items() if key != "elapsed"}) for meta in whole]


@dataclass(frozen=True)
class _Stream:
    """What layers have made of windows of one length, (n, window, d), and what each has handed on to the next."""

    hidden: torch.Tensor
    arguments: Arguments


@dataclass(frozen=True)
class _State:
    """What the original layers have made of windows, and what the compressed ones have."""

    original: _Stream
    compressed: _Stream


def _state(hidden: torch.Tensor, arguments: Arguments) -> _State:
    return _State(_Stream(hidden, arguments), _Stream(hidden.clone(), arguments.another()))


def _spans(streamed: Layerwise, states: list[_State]) -> Iterator[tuple[_State, slice]]:
    for state in states:
        for span in streamed.batches(state.original.hidden):
            yield state, span


@dataclass(frozen=True)
class _Step:
    """A layer with experts that both streams go through."""

    streamed: Layerwise
    number: int
    layer: Any
    dtype: torch.dtype

    def refit(self, states: list[_State], made: tuple[dict[str, Fit], Job]) -> tuple[Experts, Corrected]:
        """Let both streams through, in place, the compressed one with `down` refitted; its experts."""
        fits, job = made
        module, spans = self.streamed.experts(self.number), list(_spans(self.streamed, states))
        with in_place_of(module, layer_experts(self.streamed, module), self.streamed) as calls:
            for state, span in spans:
                state.original.hidden[span] = self.through(state.original, span)
                calls.clear()
        compose_layer(expert_module(module), fits, self.number, job)
        experts, (some, first) = layer_experts(self.streamed, module), spans[0]
        before, batches = some.compressed.hidden[first].clone(), []
        with in_place_of(module, experts, self.streamed) as calls:
            for state, span in spans:
                state.compressed.hidden[span] = self.through(state.compressed, span)
                batches.append(_batch(calls.pop(), (state.original.hidden[span], state.compressed.hidden[span]), span))
            gain = self._gain(experts, (before, some), batches[0])
        lost = _held_error(batches)
        ridges = [_refit(experts, group, batches, (gain, self.dtype)) for group in _groups(experts.down)]
        for (state, span), batch in zip(spans, batches, strict=True):
            wanted = state.original.hidden[span]
            lacking = (batch.residuals / batch.weights).cpu().view(wanted.shape)
            state.compressed.hidden[span] = (wanted.float() - lacking).to(wanted.dtype)
        return experts, Corrected(self.number, lost, _held_error(batches), ridges)

    def through(self, stream: _Stream, span: slice) -> torch.Tensor:
        """What the layer makes of some windows."""
        return self.streamed.run(self.number, self.layer, stream.hidden, stream.arguments, span)

    def _gain(self, experts: Experts, begin: tuple[torch.Tensor, _State], batch: _Batch) -> float:
        """What the layer multiplies its experts' output by, from the first windows before and behind it.

        Raises
        ------
        GlobeError
            If the layer's output is not linear in that of its experts.
        """
        before, state = begin
        span = slice(0, len(before))
        down = experts.down.clone()
        experts.down.zero_()
        without = self.through(_Stream(before, state.compressed.arguments), span)
        experts.down.copy_(down)
        share = (state.compressed.hidden[span].float() - without.float()).flatten(0, -2).to(down.device) * batch.weights
        made = torch.zeros_like(share)
        for group in _groups(down):
            rows, inputs = _inputs(batch, group, down.shape[2])
            made[rows] += inputs @ down[group].float().mT.flatten(0, 1)
        energy = float(made.square().sum())
        gain = float((share * made).sum()) / energy if energy > 0 else 1.0
        slack = _LINEAR[self.streamed.dtype]
        if float((share - gain * made).square().sum()) > slack**2 * float(share.square().sum()):
            raise GlobeError(
                f"{self.streamed.checkpoint.directory}: layer {self.number}'s output is not linear in that of its "
                "experts, so down cannot be corrected in closed form; use --correct none"
            )
        return gain


def _batch(seen: Seen, outputs: tuple[torch.Tensor, torch.Tensor], span: slice) -> _Batch:
    """What is kept of a call: its hidden values, which the next call overwrites, and what the output lacks."""
    device = seen.inputs.device
    original, compressed = (each.to(device).float().flatten(0, -2) for each in outputs)
    sizes = original.square().mean(1, keepdim=True).sqrt()
    weights = torch.where(sizes > 0, 1 / sizes, torch.ones_like(sizes))
    kept = Seen(seen.inputs[:0], seen.routing, seen.factors[2:].clone())
    window = len(original) // (span.stop - span.start)
    held = torch.arange(span.start, span.stop, device=device).repeat_interleave(window) % _HELD == _HELD - 1
    return _Batch(kept, weights * (original - compressed), weights, held)


def _groups(down: torch.Tensor) -> Iterator[slice]:
    """Consecutive experts of (E, d, p) that are refitted together."""
    size = max(1, WIDEST // down.shape[2])
    for first in range(0, len(down), size):
        yield slice(first, min(first + size, len(down)))


def _refit(experts: Experts, group: slice, batches: list[_Batch], form: tuple[float, torch.dtype]) -> float | None:
    """Change `down` of a group of experts, in place, and the residuals with it; the ridge that was taken.

    `form` is what the layer multiplies its experts' output by, and the dtype that `down` is stored in.
    """
    (gain, dtype), down = form, experts.down[group]
    count, d, p = down.shape
    fitted, held = (Normal.none(count * p, d) for _ in range(2))
    for batch in batches:
        rows, inputs = _inputs(batch, group, p)
        for normal, chosen in ((fitted, ~batch.held[rows]), (held, batch.held[rows])):
            normal.add(inputs[chosen] * gain, batch.residuals[rows[chosen]])
    found = regress(fitted, held)
    if found.ridge is None:
        return None
    before = down.float().clone()
    change = found.change.float().view(count, p, d).mT.to(down.device)
    down.copy_((before + change).to(dtype))
    taken = (down.float() - before).mT.reshape(count * p, d) * gain
    for batch in batches:
        rows, inputs = _inputs(batch, group, p)
        batch.residuals[rows] -= inputs @ taken
    return found.ridge


def _inputs(batch: _Batch, group: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n,) that are sent to a group's experts, and their w_te h_te (n, experts · p), weighed as residuals.

    Zero for the experts of the group that a token is not sent to.
    """
    routing, (hidden,) = batch.seen.routing, batch.seen.factors
    spans = routing.spans[group]
    sent = torch.zeros(len(batch.residuals), dtype=torch.bool, device=hidden.device)
    for span in spans:
        sent[routing.rows[span]] = True
    rows = sent.nonzero()[:, 0]
    places = sent.cumsum(0) - 1
    inputs = hidden.new_zeros(len(rows), len(spans), width)
    for number, span in enumerate(spans):
        mine = routing.rows[span]
        inputs[places[mine], number] = hidden[span] * (routing.weights[span, None] * batch.weights[mine])
    return rows, inputs.flatten(1)


def _held_error(batches: list[_Batch]) -> float:
    """Σ ‖r‖² over the tokens held out."""
    return sum(float(batch.residuals[batch.held].double().square().sum()) for batch in batches)


def _stored(down: torch.Tensor, experts: list[Expert]) -> dict[str, torch.Tensor]:
    """A layer's `down` (E, d, p) as the tensors that hold it, in their dtypes."""
    dtype = TORCH_DTYPES[experts[0].info.dtype]
    if experts[0].index is not None:
        down = down.mT if experts[0].written_transposed else down
        return {experts[0].tensor: down.to("cpu", dtype).contiguous()}
    return {each.tensor: down[each.expert].to("cpu", TORCH_DTYPES[each.info.dtype]).contiguous() for each in experts}
