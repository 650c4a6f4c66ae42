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
MOST = 1024  # sequences, where every token reads the layers again


@dataclass(frozen=True)
class Wanted:
    """How many samples, of how many tokens each, from which tokens on, and by which seed."""

    count: int
    length: int
    starts: torch.Tensor
    seed: int = 0


def own_samples(
    streamed: Layerwise, wanted: Wanted, limit: int, stages: Stages, from_disk: bool = False
) -> torch.Tensor:
    """Sample sequences from a model, every one from a token drawn from those that it may begin with.

    Tokens are drawn at temperature 1 from the model's own distribution, without cutting its tail. The whole model is in
    memory meanwhile, for a token takes a pass over all of its weights; where it does not fit, every token of all
    sequences reads the layers from disk again, one in memory at a time, if that is allowed.

    Parameters
    ----------
    streamed : Layerwise
        The model, without weights.
    wanted : Wanted
    limit : int
        Bytes of memory that may be taken.
    stages : Stages
        Shows it as stage ``sample``.
    from_disk : bool
        Whether hours may go into reading.

    Returns
    -------
    torch.Tensor of int64, shape (count, length)
        The same for a seed on the same machine with as many threads.

    Raises
    ------
    GlobeError
        If the model, or without `from_disk` all of it, does not fit in memory, or cannot be run.
    """
    checkpoint = streamed.checkpoint
    whole, at_once = _held(streamed, wanted, limit, from_disk)
    began = time.perf_counter()
    total = wanted.count * wanted.length
    held = streamed.whole() if whole else streamed.on_demand()
    with stages.stage("sample", total) as advance, held as model, own_code(checkpoint):
        found = sampled(model, wanted, advance, at_once)
    seconds = time.perf_counter() - began
    read = "" if whole else ", all layers read again for every token"
    stages.display.log(f"{total:,} tokens sampled from the model itself in {seconds:.0f} s{read}")
    return found


def _held(streamed: Layerwise, wanted: Wanted, limit: int, from_disk: bool) -> tuple[bool, int]:
    """Whether the whole model is in memory, and how many sequences are sampled at once."""
    checkpoint, width = streamed.checkpoint, streamed.dtype.itemsize
    needed = sampling_bytes(checkpoint, min(wanted.count, AT_ONCE), wanted.length, width)
    if needed <= limit:
        return True, AT_ONCE
    found = f"there is {size_text(limit)}: use --calibrate pydoc, or a larger --max-memory"
    if not from_disk:
        raise GlobeError(
            f"{checkpoint.directory}: its own samples need the whole model in memory, about {size_text(needed)}; "
            f"{found}; --calibrate self reads the layers again for every token, which may take hours"
        )
    at_once = min(wanted.count, MOST)
    while (needed := sampling_bytes(checkpoint, at_once, wanted.length, width, whole=False)) > limit:
        if at_once == 1:
            raise GlobeError(
                f"{checkpoint.directory}: its own samples need a layer in memory, about {size_text(needed)}; {found}"
            )
        at_once //= 2
    return False, at_once


def sampled(model: Any, wanted: Wanted, advance: Advance, at_once: int = AT_ONCE) -> torch.Tensor:
    """The sequences (count, length) that a model writes, so many at once."""
    random = torch.Generator().manual_seed(wanted.seed)
    drawn = torch.randint(len(wanted.starts), (wanted.count,), generator=random)
    found = torch.empty(wanted.count, wanted.length, dtype=torch.int64)
    found[:, 0] = wanted.starts[drawn]
    for ids in torch.split(found, at_once):
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
