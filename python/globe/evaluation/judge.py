"""A factored directory judged against its original, on text that its calibration has not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from globe.artifact.factored import open_factored
from globe.checkpoint.companions import EVALUATION, HELD_OUT
from globe.checkpoint.hub import local
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError, UsageError
from globe.evaluation.evaluate import load_beside
from globe.evaluation.perplexity import Evaluation, check_window, evaluate_models
from globe.evaluation.record import add_to_record, warning
from globe.statistics.held_out import held_out_texts, read_held_out
from globe.statistics.mixture import SELF
from globe.statistics.texts import read_text

MOST_TOKENS = 8192  # of each held-out half, unless another number is asked for


@dataclass(frozen=True)
class Reading:
    """How much is read, where models run, whether code of theirs may, and who is told of what is left out."""

    window: int = 512
    max_tokens: int | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Judged:
    """What was found on every text, and the warning of `globe.evaluation.record.warning`, if there is one.

    The warning takes in what the directory's evaluation.json has of other texts.
    """

    found: list[Evaluation]
    warning: str | None


def judge(out: Path, against: Path | str, texts: Sequence[str | Path] = (), reading: Reading | None = None) -> Judged:
    """Evaluate a factored directory against its original, and keep what is found in its evaluation.json.

    Parameters
    ----------
    out : Path
        Written by `globe compress`.
    against : Path or str
        The model to compare with, or its name on the hub; where it is not the checkpoint that `out` was made of,
        nothing is kept, and `reading.note` is told.
    texts : sequence
        Each as for `globe.evaluate`. With none the held-out half of every text that was calibrated on, of each its
        first 8,192 tokens unless `reading` says otherwise; the evaluation half of `evaluation_text` where `out` does
        not tell.
    reading : Reading, optional

    Returns
    -------
    Judged

    Raises
    ------
    UsageError, GlobeError
        As `globe.evaluate`.
    """
    reading = reading or Reading()
    check_window(reading.window, reading.max_tokens)
    open_factored(out)
    given, original = [read_text(text) for text in texts], local(against)
    beside = load_beside(out, original, reading.device, reading.trust_remote_code)
    return judge_loaded(out, original, beside, given, reading)


def judge_loaded(
    out: Path, against: Path, beside: tuple[Any, Any, Any], given: Sequence[tuple[str, str]], reading: Reading
) -> Judged:
    """The same with the models loaded by `load_beside`, and given texts with their names."""
    model, tokenizer, reference = beside
    held_out = read_held_out(out / HELD_OUT) if not given else None
    options: dict[str, Any] = {"window": reading.window, "max_tokens": reading.max_tokens, "reference": reference}
    found = []
    if held_out is not None:
        most = reading.max_tokens if reading.max_tokens is not None else MOST_TOKENS
        for name, text in held_out_texts(held_out, tokenizer, reading.note).items():
            label = f"{name}, held-out {'samples' if name == SELF else 'half'}"
            each = evaluate_models(model, tokenizer, text, label=label, **{**options, "max_tokens": most})
            found.append(replace(each, calibrated=True))
    for content, label in given if given or found else [read_text(None)]:
        found.append(evaluate_models(model, tokenizer, content, label=label, **options))
    try:
        if _fingerprint(against) != open_factored(out).manifest["source"]["fingerprint"]:
            raise GlobeError(f"{against} is not the checkpoint that {out} was made of")
        return Judged(found, warning(add_to_record(out, found)))
    except GlobeError as error:
        reading.note(f"{out / EVALUATION} does not tell of this: {error}")
        return Judged(found, warning(found))


def _fingerprint(directory: Path) -> str | None:
    """Of a dense checkpoint; None of what is none."""
    try:
        return Checkpoint(directory).fingerprint()
    except (GlobeError, UsageError):
        return None
