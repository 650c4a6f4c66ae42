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
from globe.correction.composed import Factors, compose_layer
from globe.correction.refit import Batch, batch_of, groups, held_error, refit_dense, refit_lefts, weighed_inputs
from globe.errors import GlobeError
from globe.fit.stored_lefts import Fit
from globe.runs.job import Job
from globe.statistics.calibration import Calibration
from globe.statistics.experts import Experts
from globe.statistics.handed import Arguments
from globe.statistics.layerwise import Layerwise
from globe.statistics.stand_in import in_place_of, layer_experts

CORRECTED = "corrected-"  # and the layer: the name of a result in a job's store
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
    widths sum to `WIDEST`, group after group where they are wider. Where `down` is factored, Δ_eᵀ = D_e B̃_e, D_e being
    what its left factor changes by, one expert after another. The compressed stream goes on with the refitted `down`,
    or left factors, as they are stored.

    Parameters
    ----------
    checkpoint : Checkpoint
    fits : dict
        The pools; left factors of down are not packed.
    text : list of torch.Tensor of int64, shape (n, window)
        Token ids, in windows of one length each.
    job : Job
        Its store gets `corrected-LAYER` with the layer's tensors under their own names, or the left factors in place of
        these; a run that is called again after all are there does nothing.
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
            step = _Step(streamed, number, layer, downs.get(number, []))
            if number in downs:
                tensors, result = step.refit(states, made)
                job.store.save(_key(number), tensors, {**asdict(result), "elapsed": job.stages.so_far()})
                yield result
            else:
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
    """A layer that both streams go through, and its experts' `down`."""

    streamed: Layerwise
    number: int
    layer: Any
    downs: list[Expert]

    def refit(
        self, states: list[_State], made: tuple[dict[str, Fit], Job]
    ) -> tuple[dict[str, torch.Tensor], Corrected]:
        """Let both streams through, in place, the compressed one with `down` refitted; what is stored of that."""
        fits, job = made
        module, spans = self.streamed.experts(self.number), list(_spans(self.streamed, states))
        with in_place_of(module, layer_experts(self.streamed, module), self.streamed) as calls:
            for state, span in spans:
                state.original.hidden[span] = self.through(state.original, span)
                calls.clear()
        factors = compose_layer(expert_module(module), fits, self.number, job)
        experts, (some, first) = layer_experts(self.streamed, module), spans[0]
        before, batches = some.compressed.hidden[first].clone(), []
        with in_place_of(module, experts, self.streamed) as calls:
            for state, span in spans:
                state.compressed.hidden[span] = self.through(state.compressed, span)
                batches.append(
                    batch_of(calls.pop(), (state.original.hidden[span], state.compressed.hidden[span]), span)
                )
            gain = self._gain(experts, (before, some), batches[0])
        lost = held_error(batches)
        if factors:
            ridges = refit_lefts(experts, factors, batches, (gain, job.settings))
        else:
            dtype = TORCH_DTYPES[self.downs[0].info.dtype]
            ridges = [refit_dense(experts, group, batches, (gain, dtype)) for group in groups(experts.down)]
        for (state, span), batch in zip(spans, batches, strict=True):
            wanted = state.original.hidden[span]
            lacking = (batch.residuals / batch.weights).cpu().view(wanted.shape)
            state.compressed.hidden[span] = (wanted.float() - lacking).to(wanted.dtype)
        tensors = _lefts(factors, self.downs) if factors else _dense(experts.down, self.downs)
        return tensors, Corrected(self.number, lost, held_error(batches), ridges)

    def through(self, stream: _Stream, span: slice) -> torch.Tensor:
        """What the layer makes of some windows."""
        return self.streamed.run(self.number, self.layer, stream.hidden, stream.arguments, span)

    def _gain(self, experts: Experts, begin: tuple[torch.Tensor, _State], batch: Batch) -> float:
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
        for group in groups(down):
            rows, inputs = weighed_inputs(batch, group, down.shape[2])
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


def _dense(down: torch.Tensor, experts: list[Expert]) -> dict[str, torch.Tensor]:
    """A layer's `down` (E, d, p) as the tensors that hold it, in their dtypes."""
    dtype = TORCH_DTYPES[experts[0].info.dtype]
    if experts[0].index is not None:
        down = down.mT if experts[0].written_transposed else down
        return {experts[0].tensor: down.to("cpu", dtype).contiguous()}
    return {each.tensor: down[each.expert].to("cpu", TORCH_DTYPES[each.info.dtype]).contiguous() for each in experts}


def _lefts(factors: dict[int, Factors], experts: list[Expert]) -> dict[str, torch.Tensor]:
    """A layer's left factors of `down` under the names of the tensors that held it, stacked where it is."""
    if experts[0].index is not None:
        stack = [factors[each.expert].left for each in sorted(experts, key=lambda each: each.index or 0)]
        return {experts[0].tensor: torch.stack(stack).cpu()}
    return {each.tensor: factors[each.expert].left.cpu() for each in experts}
