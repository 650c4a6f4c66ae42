"""Evaluation of many checkpoints against one original, whose logits are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from globe.evaluation.evaluate import evaluate_models, geometric_mean
from globe.evaluation.models import load_model

_MOST_BYTES = 16 << 30  # of logits kept; beyond, the original is run again for every method


class Remembered:
    """Stands in for a model: the logits of tokens seen before come from disk, in fp32 as they were."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder, self.device, self.kept = model, folder, model.device, 0

    def get_input_embeddings(self) -> Any:
        """As the model's."""
        return self.model.get_input_embeddings()

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """The model's logits; window by window, so that it does not matter how they are batched."""
        return SimpleNamespace(logits=torch.cat([self._window(ids[None], use_cache) for ids in input_ids]))

    def _window(self, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        file = self.folder / hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        if file.exists():
            stored: torch.Tensor = torch.load(file)
            return stored
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=use_cache).logits
        if self.kept + logits.nbytes <= _MOST_BYTES:
            self.kept += logits.nbytes
            torch.save(logits, file)
        return logits


class Judge:
    """Measures dense checkpoints as language models against the original.

    Parameters
    ----------
    model : Path
        The original.
    texts : mapping of str to str
        By their names.
    window, tokens : int
        Tokens in a window, and most tokens of each text.
    scratch : Path
        For the original's logits.
    """

    def __init__(self, model: Path, texts: Mapping[str, str], window: int, tokens: int, scratch: Path) -> None:
        self.texts = dict(texts)
        self.window, self.tokens = window, tokens
        loaded, self.tokenizer = load_model(model)
        folder = scratch / "logits"
        folder.mkdir()
        self.reference = Remembered(loaded, folder)
        self.originals: dict[str, float] = {}

    def evaluate(self, dense: Path) -> dict[str, Any]:
        """Perplexity of each text, KL(original‖checkpoint) in nats a token, how often the likeliest token is the same.

        `ratios` are perplexities over the original's, `geometric_mean` is theirs; `kl` and `top1_agreement` are means
        over the texts.
        """
        model, _ = load_model(dense)
        options: dict[str, Any] = {"window": self.window, "max_tokens": self.tokens, "reference": self.reference}
        found = {
            name: evaluate_models(model, self.tokenizer, text, label=name, **options)
            for name, text in self.texts.items()
        }
        self.originals = {name: each.reference_perplexity or math.nan for name, each in found.items()}
        count = len(found)
        return {
            "perplexities": {name: each.perplexity for name, each in found.items()},
            "original_perplexities": self.originals,
            "ratios": {name: each.perplexity / self.originals[name] for name, each in found.items()},
            "geometric_mean": geometric_mean(list(found.values())),
            "kl": sum(each.kl or 0.0 for each in found.values()) / count,
            "top1_agreement": sum(each.top1_agreement or 0.0 for each in found.values()) / count,
            "evaluation_tokens": {name: each.tokens for name, each in found.items()},
        }
