"""Evaluate checkpoint directories as language models, by themselves or against what they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from globe.errors import GlobeError
from globe.evaluation.models import generate_sentence, load_model
from globe.evaluation.perplexity import Evaluation, Progress, check_window, evaluate_models, geometric_mean
from globe.statistics.texts import evaluation_text, read_text

__all__ = [
    "Evaluation",
    "evaluate",
    "evaluate_models",
    "evaluate_texts",
    "evaluation_text",
    "geometric_mean",
    "generate_sentence",
    "load_beside",
    "load_model",
]


def evaluate(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a checkpoint directory, dense or factored.

    Parameters
    ----------
    directory : str or Path
        Checkpoint directory with a tokenizer.
    against : str or Path, optional
        Directory of the model to compare with; both are held in memory together.
    text : str or Path, optional
        A `Path` is a UTF-8 file to read, a `str` the text itself; by default the evaluation half of
        `evaluation_text`.
    window, max_tokens, progress
        As for `evaluate_models`.
    device : str
        A torch device.
    trust_remote_code : bool
        Run Python code that a checkpoint brings with it (`auto_map`); without, such a checkpoint is refused.

    Returns
    -------
    Evaluation
    """
    found = evaluate_texts(
        directory,
        [text],
        against=against,
        window=window,
        max_tokens=max_tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return found[0]


def evaluate_texts(
    directory: str | Path,
    texts: Sequence[str | Path | None],
    *,
    against: str | Path | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Evaluate a checkpoint directory on several texts, with its model loaded once.

    Parameters
    ----------
    texts : sequence
        Each as for `evaluate`; `max_tokens` counts for each.
    directory, against, window, max_tokens, device, trust_remote_code, progress
        As for `evaluate`.

    Returns
    -------
    list of Evaluation
        In the order of the texts; `geometric_mean` makes one figure of them.
    """
    read = [read_text(text) for text in texts]
    check_window(window, max_tokens)
    model, tokenizer, reference = load_beside(directory, against, device, trust_remote_code)
    options: dict[str, Any] = {"window": window, "max_tokens": max_tokens, "reference": reference, "progress": progress}
    return [evaluate_models(model, tokenizer, content, label=label, **options) for content, label in read]


def load_beside(
    directory: str | Path, against: str | Path | None, device: str, trust_remote_code: bool
) -> tuple[Any, Any, Any]:
    """A model, its tokenizer, and the model to compare it with, None if none is named.

    Raises
    ------
    GlobeError
        If one cannot be loaded, or their tokenizers differ.
    """
    model, tokenizer = load_model(directory, device, trust_remote_code=trust_remote_code)
    if against is None:
        return model, tokenizer, None
    reference, its_tokenizer = load_model(against, device, trust_remote_code=trust_remote_code)
    _check_same_tokenizer(Path(directory), tokenizer, Path(against), its_tokenizer)
    return model, tokenizer, reference


def _check_same_tokenizer(directory: Path, tokenizer: Any, against: Path, its_tokenizer: Any) -> None:
    if len(tokenizer) != len(its_tokenizer):
        raise GlobeError(
            f"{directory} has a tokenizer of {len(tokenizer)} tokens, {against} one of {len(its_tokenizer)}; "
            "compare models with the same tokenizer"
        )
    if tokenizer.get_vocab() != its_tokenizer.get_vocab():
        raise GlobeError(f"{directory} and {against} have tokenizers with different tokens")
