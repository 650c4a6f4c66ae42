"""Windows of tokens to learn on: given texts and what the original says by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from globe.errors import GlobeError
from globe.healing.options import Healing
from globe.statistics.documents import CALIBRATION
from globe.statistics.mixture import PYDOC
from globe.statistics.own import Wanted, sampled, start_tokens
from globe.statistics.python_texts import PARTS, python_documents
from globe.statistics.texts import read_text

_HELD_SHARE, _MOST_HELD = 16, 8  # of a text's windows one in so many is held out, at most so many


@dataclass(frozen=True)
class Reading:
    """Windows (n, window) to learn on, and by text those held out."""

    windows: torch.Tensor
    held: dict[str, torch.Tensor]


def given_texts(options: Healing) -> dict[str, str]:
    """The given texts by name; with none the calibration halves of what every Python carries."""
    if options.text:
        return {label: text for text, label in (read_text(path) for path in options.text)}
    found = {f"{PYDOC}:{part}": python_documents(part, CALIBRATION) for part in PARTS}
    joined = {name: "\n\n".join(str(each.content) for each in documents) for name, documents in found.items()}
    return {name: text for name, text in joined.items() if text}


def texts_key(texts: dict[str, str]) -> dict[str, str]:
    """The SHA-256 of every text by name."""
    return {label: hashlib.sha256(text.encode()).hexdigest() for label, text in texts.items()}


def read_windows(
    texts: dict[str, str], tokenizer: Any, teacher: Any, options: Healing, advance: Callable[[float], None]
) -> Reading:
    """Windows of the texts and of samples of the original, the held-out ones spread evenly over each text.

    Raises
    ------
    GlobeError
        If a text has not two windows.
    """
    found = {label: _cut(label, text, tokenizer, options) for label, text in texts.items()}
    if options.own_tokens >= 2 * options.window:
        found["samples of the original"] = samples(teacher, tokenizer, options, advance)
    learned, held = [], {}
    for label, windows in found.items():
        count = min(_MOST_HELD, max(1, len(windows) // _HELD_SHARE))
        chosen = torch.zeros(len(windows), dtype=torch.bool)
        chosen[[(2 * number + 1) * len(windows) // (2 * count) for number in range(count)]] = True
        held[label] = windows[chosen]
        learned.append(windows[~chosen])
    return Reading(torch.cat(learned), held)


def _cut(label: str, text: str, tokenizer: Any, options: Healing) -> torch.Tensor:
    """Windows of a text, evenly spread where it has more tokens than are wanted."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // options.window
    if count < 2:
        raise GlobeError(
            f"the text ({label}) has {len(ids)} tokens; expected at least two windows of {options.window}: give a "
            "longer text or a smaller window"
        )
    windows = torch.tensor(ids[: count * options.window]).view(count, options.window)
    wanted = min(count, max(2, options.text_tokens // options.window))
    return windows[[number * count // wanted for number in range(wanted)]]


def samples(teacher: Any, tokenizer: Any, options: Healing, advance: Callable[[float], None]) -> torch.Tensor:
    """Windows that a model samples at temperature 1, begun as its tokenizer begins a text, or anyhow."""
    rows = options.own_tokens // options.window
    return sampled(teacher, Wanted(rows, options.window, start_tokens(tokenizer), options.seed), advance)
