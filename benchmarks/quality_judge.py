"""Evaluation of many checkpoints against one original, whose logits are computed once and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from globe.evaluation.evaluate import evaluate_models
from globe.evaluation.models import load_model
from globe.statistics.texts import read_text

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
    text : Path, optional
        By default the evaluation half of Python's own help topics.
    window, tokens : int
    scratch : Path
        For the original's logits.
    """

    def __init__(self, model: Path, text: Path | None, window: int, tokens: int, scratch: Path) -> None:
        self.text, self.label = read_text(text)
        self.window, self.tokens = window, tokens
        loaded, self.tokenizer = load_model(model)
        folder = scratch / "logits"
        folder.mkdir()
        self.reference = Remembered(loaded, folder)
        self.original: float | None = None

    def evaluate(self, dense: Path) -> dict[str, Any]:
        """Perplexity, KL(original‖checkpoint) in nats a token, and how often the likeliest token is the same."""
        model, _ = load_model(dense)
        found = evaluate_models(
            model,
            self.tokenizer,
            self.text,
            window=self.window,
            max_tokens=self.tokens,
            reference=self.reference,
            label=self.label,
        )
        self.original = found.reference_perplexity
        return {
            "perplexity": found.perplexity,
            "original_perplexity": found.reference_perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "evaluation_tokens": found.tokens,
        }
