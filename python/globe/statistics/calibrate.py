"""Activation statistics of a checkpoint's experts, from a text that flows through it one decoder layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from globe._version import __version__
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.pretrained import import_transformers, load_tokenizer, quiet
from globe.compute.devices import find_device
from globe.errors import GlobeError, UsageError
from globe.runs.job import Job
from globe.runs.stages import Display, Stages
from globe.statistics.calibration import Calibration, LayerStatistics, load_calibration, save_calibration
from globe.statistics.layerwise import Arguments, Layerwise, NotFinite, own_code, require_runnable
from globe.statistics.moments import Moments
from globe.statistics.texts import read_text

RowMoments = Literal["auto", "diagonal", "full"]
ROW_MOMENTS: tuple[RowMoments, ...] = ("auto", "diagonal", "full")
TOKENS, WINDOW = 32768, 512
FILE = "calibration.safetensors"
STATISTICS = "statistics"  # the folder of FILE within a run's

_AUTO_BYTES = 1 << 30
_PROBE = 16  # tokens on which the experts' products are compared with the module's own
_SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def calibrate(
    model_dir: Path | str,
    path: Path | str,
    *,
    text: Path | str | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    device: str = "cpu",
    row_moments: RowMoments = "auto",
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Calibration:
    """Measure the second moments of the experts' inputs on a text, and write them to a file.

    The text is cut into windows that do not overlap. They pass through the decoder layer by layer, and only the layer
    in hand has its weights in memory, beside the hidden states of all windows and the statistics.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory with a tokenizer, of an architecture that transformers has.
    path : Path or str
        The file to write; one that is there is replaced.
    text : Path or str, optional
        A `Path` is a UTF-8 file to read, a `str` the text itself; by default the calibration half of
        `evaluation_text`, which shares no character with the half that `evaluate` reads.
    tokens : int
        Most tokens to read. Below 4 d the moments of d inputs are poorly known.
    window : int
        Tokens in a window.
    device : str
        A torch device. A CPU computes in float32, others in the checkpoint's dtype; sums are kept on the CPU.
    row_moments : {"auto", "diagonal", "full"}
        Whether the p × p moments of every expert's rows are stored: `auto` where all of them take less than 1 GiB.
    trust_remote_code : bool
        Run Python code that the checkpoint brings with it (`auto_map`); without, such a checkpoint is refused.
    progress : Display, optional
        Shows the layers as they go.

    Returns
    -------
    Calibration
        The file. `about["warnings"]` tells of too few tokens and of experts that were sent none.

    Raises
    ------
    UsageError
        If an argument cannot be used.
    GlobeError
        If the checkpoint cannot be run or the text is too short.
    """
    checkpoint = Checkpoint(Path(model_dir))
    reading = _read(checkpoint, text, tokens, window, trust_remote_code)
    return _measure(reading, Path(path), device, row_moments, Stages(progress))


def calibration_for(
    checkpoint: Checkpoint, job: Job, folder: Path, *, trust_remote_code: bool = False
) -> Calibration | None:
    """The statistics that a compression uses.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model to compress.
    job : Job
        Setting `calibrate`: ``none``; ``pydoc``, to measure on `calibrate`'s own text; ``auto``, the same where the
        model can be run and else none; or a calibration file of this checkpoint. Setting `calibration_tokens`: the
        most tokens to read.
    folder : Path
        Where measured statistics are kept; made here. What lies there of the same checkpoint, text, tokens and window
        is used again. A run that began without statistics goes on without.
    trust_remote_code : bool
        As for `calibrate`.

    Returns
    -------
    Calibration or None

    Raises
    ------
    GlobeError
        If the file is of another checkpoint, weights give values that are not finite, or, unless `calibrate` is
        ``auto``, the model cannot be run.
    """
    choice, tokens = job.settings.calibrate, job.settings.calibration_tokens
    if choice == "none":
        return None
    if is_file(choice):
        return named_calibration(checkpoint, choice)
    before = job.store.check("calibration")
    if before is not None and before["none"] is not None:  # what is fitted already was fitted without
        job.log(f"weights only, as when this run began: {before['none']}")
        return None
    folder.mkdir(exist_ok=True)
    try:
        longest = checkpoint.config.get("max_position_embeddings")
        window = min(WINDOW, longest if isinstance(longest, int) else WINDOW, tokens // 2)
        reading = _read(checkpoint, None, tokens, window, trust_remote_code)
        earlier = _found_before(folder / FILE, reading)
        if earlier is not None:
            if before is not None:
                job.stages.recall(before["stage"])
            job.log(f"calibrated before, on {earlier.about['tokens']:,} tokens of {reading.label}")
            return earlier
        found = _measure(reading, folder / FILE, str(job.device), "auto", job.stages)
    except GlobeError as error:
        if choice == "pydoc" or isinstance(error, NotFinite):
            raise
        job.store.save("calibration", {}, {"none": str(error)})
        job.log(f"weights only, without activation statistics: {error}")
        return None
    job.store.save("calibration", {}, {"none": None, "stage": job.stages.as_list()[-1]})
    job.log(f"calibrated on {found.about['tokens']:,} tokens of {reading.label}")
    return found


def is_file(choice: str) -> bool:
    """Whether a choice of calibration names a file."""
    return choice not in ("none", "auto", "pydoc")


def named_calibration(checkpoint: Checkpoint, choice: str) -> Calibration | None:
    """The calibration file that a choice names, if it does.

    Raises
    ------
    GlobeError
        If it is not one, or of another checkpoint.
    """
    if not is_file(choice):
        return None
    found = load_calibration(Path(choice))
    if found.about.get("fingerprint") != checkpoint.fingerprint():
        raise GlobeError(
            f"calibration {choice}: made of another checkpoint than {checkpoint.directory}; run globe calibrate on "
            "this one"
        )
    return found


@dataclass(frozen=True)
class _Reading:
    """A text cut into windows (n, window) for a checkpoint, and what the file tells of it."""

    checkpoint: Checkpoint
    windows: torch.Tensor
    label: str
    about: dict[str, Any]
    trust_remote_code: bool = False


def _read(
    checkpoint: Checkpoint, text: Path | str | None, tokens: int, window: int, trust_remote_code: bool
) -> _Reading:
    if window < 2:
        raise UsageError(f"window is {window}; expected at least 2 tokens")
    if tokens < 2 * window:
        raise UsageError(f"tokens is {tokens}; expected at least two windows of {window}")
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and window > longest:
        raise UsageError(f"window is {window}; the model knows {longest} positions")
    require_runnable(checkpoint)
    content, label = read_text(text, "calibration")
    transformers = import_transformers("calibration")
    with own_code(checkpoint), quiet(transformers):
        tokenizer = load_tokenizer(transformers, checkpoint.directory, trust_remote_code)
        for characters in (16 * tokens, len(content)):  # a long text need not be read to its end
            ids = tokenizer(content[:characters], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > tokens:
                break
    ids = ids[:tokens]
    count = len(ids) // window
    if count < 2:
        raise GlobeError(
            f"the text ({label}) has {len(ids)} tokens; expected at least two windows of {window}: give a longer text "
            "or a smaller window"
        )
    about = {
        "fingerprint": checkpoint.fingerprint(),
        "text": label,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "tokens": count * window,
        "window": window,
    }
    windows = torch.tensor(ids[: count * window]).view(count, window)
    return _Reading(checkpoint, windows, label, about, trust_remote_code)


def stores_row_moments(gates: Family) -> bool:
    """Whether `auto` row moments are full ones."""
    return 3 * 4 * len(gates) * gates.p**2 < _AUTO_BYTES


def _found_before(path: Path, reading: _Reading) -> Calibration | None:
    try:
        found = load_calibration(path)
    except GlobeError:
        return None
    same = all(found.about.get(key) == value for key, value in reading.about.items() if key != "text")
    return found if same else None


def _measure(reading: _Reading, path: Path, device: str, row_moments: RowMoments, stages: Stages) -> Calibration:
    if row_moments not in ROW_MOMENTS:
        raise UsageError(f"row moments is {row_moments!r}; expected one of {', '.join(ROW_MOMENTS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such directory; expected a place for the calibration file")
    if path.is_dir():
        raise UsageError(f"{path}: is a directory; expected a name for the calibration file")
    checkpoint, gates = reading.checkpoint, reading.checkpoint.family("gate")
    full = row_moments == "full" or (row_moments == "auto" and stores_row_moments(gates))
    streamed = Layerwise(checkpoint, find_device(device), reading.trust_remote_code)
    with own_code(checkpoint):
        known, largest = streamed.model.get_input_embeddings().num_embeddings, int(reading.windows.max())
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
            for number, statistics in _stream(streamed, reading.windows, last, full):
                if statistics is not None:
                    layers[number] = statistics
                advance(1)
        warnings = _warnings(layers, reading.about["tokens"], gates.d)
        for line in warnings:
            stages.display.log(line)
        about = {**reading.about, "globe_version": __version__, "device": device, "warnings": warnings}
        return save_calibration(path, layers, about)


def _stream(
    streamed: Layerwise, windows: torch.Tensor, last: int, full: bool
) -> Iterator[tuple[int, LayerStatistics | None]]:
    """The statistics of one layer after another, None where it has no experts."""
    hidden, arguments = streamed.embed(windows)
    for number in range(last + 1):
        yield number, _pass(streamed, number, hidden, arguments, full)


def _pass(
    streamed: Layerwise, number: int, hidden: torch.Tensor, arguments: Arguments, full: bool
) -> LayerStatistics | None:
    """Let all windows through a layer, in place."""
    with streamed.layer(number) as layer:
        experts = streamed.experts(number)
        if experts is None:
            for span in streamed.batches(hidden):
                hidden[span] = streamed.run(number, layer, hidden[span], arguments(number, span))
            return None
        with _noted(experts) as calls:
            moments = _moments(streamed, experts, full)
            for span in streamed.batches(hidden):
                hidden[span] = streamed.run(number, layer, hidden[span], arguments(number, span))
                inputs, chosen, weights, output = calls.pop()
                if moments.tokens == 0:
                    some = [part[:_PROBE] for part in (inputs, chosen, weights)]
                    distance = torch.linalg.norm((moments.output(*some) - output[:_PROBE]).float())
                    if distance > _SAME[output.dtype] * torch.linalg.norm(output[:_PROBE].float()):
                        raise _other_form(streamed, experts)
                moments.add(inputs, chosen, weights, hidden[span].flatten(0, -2))
        return moments.statistics()


@contextmanager
def _noted(experts: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """What a layer's experts are given, and what they make of it, call by call."""
    calls = []

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
        calls.append((hidden_states, top_k_index, top_k_weights, output))
        return output

    experts.forward = forward
    try:
        yield calls
    finally:
        del experts.forward


def _moments(streamed: Layerwise, experts: Any, full: bool) -> Moments:
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    count, d, p = down.shape
    if gate_up.shape != (count, 2 * p, d):
        raise _other_form(streamed, experts)
    return Moments(gate_up, down, experts.act_fn, full=full)


def _other_form(streamed: Layerwise, experts: Any) -> GlobeError:
    return GlobeError(
        f"{streamed.checkpoint.directory}: {type(experts).__name__} is not down (φ(gate x) · up x), the form of expert "
        "that calibration knows; compress it without calibration (--calibrate none)"
    )


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
