"""A text cut into windows of tokens for a checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.index import Checkpoint
from globe.checkpoint.pretrained import import_transformers, load_tokenizer, quiet
from globe.errors import GlobeError, UsageError
from globe.statistics.layerwise import own_code, require_runnable
from globe.statistics.texts import read_text

TOKENS, WINDOW = 32768, 512


@dataclass(frozen=True)
class Reading:
    """A text cut into windows (n, window) for a checkpoint, and what the file tells of it."""

    checkpoint: Checkpoint
    windows: torch.Tensor
    label: str
    about: dict[str, Any]
    trust_remote_code: bool = False


def read_windows(
    checkpoint: Checkpoint, text: Path | str | None, tokens: int, window: int, trust_remote_code: bool
) -> Reading:
    """The first `tokens` of a text in windows that do not overlap; a last one that is not full is left out.

    Raises
    ------
    UsageError
        If the numbers do not fit each other or the model.
    GlobeError
        If the checkpoint cannot be run or the text is too short.
    """
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
    return Reading(checkpoint, windows, label, about, trust_remote_code)
