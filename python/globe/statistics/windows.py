"""Texts cut into windows of tokens for a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.index import Checkpoint
from globe.checkpoint.pretrained import import_transformers, load_tokenizer, quiet
from globe.errors import GlobeError, UsageError
from globe.statistics.diversity import most_diverse
from globe.statistics.documents import CALIBRATION, Document, half_of, read_documents
from globe.statistics.layerwise import own_code, require_runnable
from globe.statistics.mixture import PYDOC, SELF, Text, deal
from globe.statistics.own import LENGTH, TEMPERATURE, Wanted, start_tokens
from globe.statistics.python_texts import python_documents

WINDOW = 512
_POOL = 8  # times the tokens of a text's share: its windows are chosen from as many at most
_CHARACTERS = 16  # of a token, rarely more

Note = Callable[[str], None]


@dataclass(frozen=True)
class Ask:
    """Which texts to read, how many tokens of them at most, in windows of how many."""

    texts: tuple[Text, ...]
    tokens: int
    window: int = WINDOW
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Reading:
    """Texts cut into windows (n, window) for a checkpoint, and what the file tells of them.

    Where samples of the model itself are asked for, `wanted` says how many, with those held out; they are there once
    `with_samples` has taken them, each a window of its own.
    """

    checkpoint: Checkpoint
    windows: torch.Tensor
    label: str
    about: dict[str, Any]
    trust_remote_code: bool = False
    wanted: Wanted | None = None
    samples: torch.Tensor | None = None
    held_out: torch.Tensor | None = None

    @property
    def parts(self) -> list[torch.Tensor]:
        """The windows and the samples, as far as there are any."""
        return [part for part in (self.windows, self.samples) if part is not None and len(part) > 0]

    def with_samples(self, samples: torch.Tensor) -> Reading:
        """The reading with its samples, the last of which are held out."""
        count = next(text["samples"] for text in self.about["texts"] if text["name"] == SELF)
        kept = samples[:count]
        texts = [text | {"sha256": _sha256(kept)} if text["name"] == SELF else text for text in self.about["texts"]]
        about = self.about | {"texts": texts, "sha256": _sha256(self.windows, kept)}
        return replace(self, about=about, samples=kept, held_out=samples[count:])


def read_windows(checkpoint: Checkpoint, ask: Ask, note: Note) -> Reading:
    """The calibration halves of texts in windows that do not overlap, chosen for variety where there are too many.

    Raises
    ------
    UsageError
        If the numbers do not fit each other or the model, or a file is not there.
    GlobeError
        If the checkpoint cannot be run or the texts are too short.
    """
    _check(checkpoint, ask)
    transformers = import_transformers("calibration")
    with own_code(checkpoint), quiet(transformers):
        tokenizer = load_tokenizer(transformers, checkpoint.directory, ask.trust_remote_code)
        found = [_cut(text, ask, tokenizer, note) for text in ask.texts]
    label, length = _label(ask.texts), min(ask.window, LENGTH)
    counts = _deal(ask, [len(each.windows) for each in found])
    tokens = sum(counts) * ask.window
    if tokens < 2 * ask.window:
        there = sum(each.tokens for each in found)
        raise GlobeError(
            f"the text ({label}) has {there} tokens; expected at least two windows of {ask.window}: give a longer text "
            "or a smaller window"
        )
    parts, told = [], []
    wanted: Wanted | None = None
    for text, each, count in zip(ask.texts, found, counts, strict=True):
        entry: dict[str, Any] = {"name": text.name, "weight": round(text.share, 6)}
        if text.name == SELF:
            samples = max(1, count * ask.window // length)
            held_out = -(-samples // 4)
            with own_code(checkpoint):
                wanted = Wanted(samples + held_out, length, start_tokens(tokenizer))
            entry |= {"samples": samples, "held_out": held_out, "length": length, "tokens": samples * length}
            entry |= {"seed": wanted.seed, "temperature": TEMPERATURE}
            tokens += samples * length - count * ask.window
        else:
            parts.append(each.windows[most_diverse(each.windows, count)])
            entry |= {"tokens": count * ask.window, "of": each.tokens, "sha256": each.sha256}
        told.append(entry)
    for entry in told:
        entry["share"] = round(entry["tokens"] / tokens, 6)
    windows = torch.cat(parts) if parts else torch.empty(0, ask.window, dtype=torch.int64)
    about: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint(),
        "text": label,
        "texts": told,
        "tokens": tokens,
        "window": ask.window,
    }
    if wanted is None:
        about["sha256"] = told[0]["sha256"] if len(told) == 1 else _sha256(windows)
    return Reading(checkpoint, windows, label, about, ask.trust_remote_code, wanted)


def documents_of(name: str, half: str, note: Note) -> list[Document]:
    """A half of the documents of a text's name, other than ``self``; empty where this Python lacks it."""
    if name.startswith(f"{PYDOC}:"):
        return python_documents(name.partition(":")[2], half)
    return half_of(read_documents(Path(name), note), half)


@dataclass(frozen=True)
class _Cut:
    windows: torch.Tensor
    tokens: int
    sha256: str


def _check(checkpoint: Checkpoint, ask: Ask) -> None:
    if ask.window < 2:
        raise UsageError(f"window is {ask.window}; expected at least 2 tokens")
    if ask.tokens < 2 * ask.window:
        raise UsageError(f"tokens is {ask.tokens}; expected at least two windows of {ask.window}")
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and ask.window > longest:
        raise UsageError(f"window is {ask.window}; the model knows {longest} positions")
    require_runnable(checkpoint)


def _cut(text: Text, ask: Ask, tokenizer: Any, note: Note) -> _Cut:
    """All windows that a text's own may be chosen from."""
    if text.name == SELF:
        return _Cut(torch.empty(ask.tokens // ask.window, 0, dtype=torch.int64), 0, "")
    documents = [Document(text.name, text.content)] if text.content is not None else None
    if documents is None:
        documents = documents_of(text.name, CALIBRATION, note)
    group = sum(each.share for each in ask.texts if each.group == text.group)
    most = max(ask.tokens, round(_POOL * group * ask.tokens))
    ids: list[int] = []
    digest = hashlib.sha256()
    for document in documents:
        content = document.render(tokenizer)
        digest.update(content.encode(errors="surrogatepass"))
        ids += first_tokens(tokenizer, content, most - len(ids))
        if len(ids) >= most:
            break
    count = len(ids) // ask.window
    return _Cut(
        torch.tensor(ids[: count * ask.window], dtype=torch.int64).view(count, ask.window), len(ids), digest.hexdigest()
    )


def first_tokens(tokenizer: Any, content: str, most: int) -> list[int]:
    """The first tokens of a text, which need not be read to its end."""
    ids: list[int] = []
    for characters in (_CHARACTERS * most, len(content)):
        ids = tokenizer(content[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > most or characters >= len(content):
            break
    return ids[:most]


def _deal(ask: Ask, there: list[int]) -> list[int]:
    """Windows of each text: by shares among what was asked for, then among the parts of each."""
    groups = list(dict.fromkeys(text.group for text in ask.texts))
    members = [[place for place, text in enumerate(ask.texts) if text.group == group] for group in groups]
    shares = [sum(ask.texts[place].share for place in places) for places in members]
    dealt = deal(ask.tokens // ask.window, shares, [sum(there[place] for place in places) for places in members])
    counts = [0] * len(ask.texts)
    for places, count in zip(members, dealt, strict=True):
        mine = deal(count, [ask.texts[place].share for place in places], [there[place] for place in places])
        for place, each in zip(places, mine, strict=True):
            counts[place] = each
    return counts


def _label(texts: tuple[Text, ...]) -> str:
    names = list(dict.fromkeys(text.group for text in texts))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sha256(*parts: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
