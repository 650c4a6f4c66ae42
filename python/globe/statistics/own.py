"""Samples of a model itself: what it writes when nothing is asked of it, many sequences at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from globe.errors import GlobeError
from globe.runs.stages import Advance, Stages
from globe.sizes.budget import size_text
from globe.statistics.decoding import decoding_cache
from globe.statistics.layerwise import Layerwise, own_code
from globe.statistics.sampling_memory import sampling_bytes

LENGTH = 256  # most tokens of a sample
TEMPERATURE = 1.0
AT_ONCE = 128  # sequences: products of as many rows keep a CPU's cores busy


@dataclass(frozen=True)
class Wanted:
    """How many samples, of how many tokens each, from which tokens on, and by which seed."""

    count: int
    length: int
    starts: torch.Tensor
    seed: int = 0


def own_samples(streamed: Layerwise, wanted: Wanted, limit: int, stages: Stages) -> torch.Tensor:
    """Sample sequences from a model, every one from a token drawn from those that it may begin with.

    Tokens are drawn at temperature 1 from the model's own distribution, without cutting its tail. The whole model is in
    memory meanwhile: a token takes a pass over all of its weights, which cannot be had from disk.

    Parameters
    ----------
    streamed : Layerwise
        The model, without weights.
    wanted : Wanted
    limit : int
        Bytes of memory that may be taken.
    stages : Stages
        Shows it as stage ``sample``.

    Returns
    -------
    torch.Tensor of int64, shape (count, length)
        The same for a seed on the same machine with as many threads.

    Raises
    ------
    GlobeError
        If the model does not fit in memory, or cannot be run.
    """
    checkpoint = streamed.checkpoint
    needed = sampling_bytes(checkpoint, min(wanted.count, AT_ONCE) * wanted.length, streamed.dtype.itemsize)
    if needed > limit:
        raise GlobeError(
            f"{checkpoint.directory}: its own samples need the whole model in memory, about {size_text(needed)}; there "
            f"is {size_text(limit)}: use --calibrate pydoc, or a larger --max-memory"
        )
    began = time.perf_counter()
    total = wanted.count * wanted.length
    with stages.stage("sample", total) as advance, streamed.whole() as model, own_code(checkpoint):
        found = sampled(model, wanted, advance)
    seconds = time.perf_counter() - began
    stages.display.log(f"{total:,} tokens sampled from the model itself in {seconds:.0f} s")
    return found


def sampled(model: Any, wanted: Wanted, advance: Advance) -> torch.Tensor:
    """The sequences (count, length) that a model in memory writes, `AT_ONCE` at a time."""
    random = torch.Generator().manual_seed(wanted.seed)
    drawn = torch.randint(len(wanted.starts), (wanted.count,), generator=random)
    found = torch.empty(wanted.count, wanted.length, dtype=torch.int64)
    found[:, 0] = wanted.starts[drawn]
    for ids in torch.split(found, AT_ONCE):
        advance(len(ids))
        for _ in _continued(model, ids, random):
            advance(len(ids))
    return found


def start_tokens(tokenizer: Any) -> torch.Tensor:
    """The tokens that a sample may begin with: what the tokenizer itself begins a text with, or any but special ones.

    Raises
    ------
    GlobeError
        If there is none.
    """
    before = tokenizer("")["input_ids"]
    begin = tokenizer.bos_token_id
    if begin is not None and begin in before:
        return torch.tensor([begin])
    special = set(tokenizer.all_special_ids)
    found = sorted(set(tokenizer.get_vocab().values()) - special)
    if not found:
        raise GlobeError("the tokenizer has no token but special ones; there is nothing that a sample could begin with")
    return torch.tensor(found)


def _continued(model: Any, ids: torch.Tensor, random: torch.Generator) -> Iterator[None]:
    """Fill sequences (n, length) from their first tokens on, in place, a step at a time."""
    cache = decoding_cache(model.config, ids.shape[1])
    for place in range(1, ids.shape[1]):
        with torch.no_grad():
            said = model(input_ids=ids[:, place - 1, None].to(model.device), past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        logits = said.logits[:, -1].float().cpu() / TEMPERATURE
        if not torch.isfinite(logits).all():
            raise GlobeError("the model's logits are not finite; its weights or its compute type are damaged")
        ids[:, place] = _drawn(logits, random)
        yield


def _drawn(logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A token of each row (n, vocabulary), by its probability: one number of the generator for each row."""
    heaped = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    height = torch.rand(len(logits), 1, dtype=torch.float64, generator=random) * heaped[:, -1:]
    return torch.searchsorted(heaped, height, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
