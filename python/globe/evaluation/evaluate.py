"""Measure a checkpoint as a language model: perplexity, and how far it moved from the model it was made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from globe.errors import GlobeError, UsageError
from globe.evaluation.models import generate_sentence, load_model
from globe.statistics.texts import evaluation_text, read_text

__all__ = [
    "Evaluation",
    "evaluate",
    "evaluate_models",
    "evaluate_texts",
    "evaluation_text",
    "geometric_mean",
    "generate_sentence",
    "load_model",
]

_LOGIT_BYTES = 256 << 20
_MOST_WINDOWS = 8
_KL_ROWS = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes
    ----------
    perplexity : float
        Exponential of the mean negative log likelihood of a token.
    tokens : int
        Number of tokens predicted.
    window : int
        Tokens in one window; the first of them is context only.
    text : str
        Which text was read.
    kl : float or None
        Mean KL(reference‖model) of a token, in nats.
    top1_agreement : float or None
        Fraction of positions at which both models' most likely token is the same.
    reference_perplexity : float or None
        The reference model's perplexity on the same tokens.
    seconds : float
        Time taken, loading excluded.
    """

    perplexity: float
    tokens: int
    window: int
    text: str
    kl: float | None
    top1_agreement: float | None
    reference_perplexity: float | None
    seconds: float


def evaluate_models(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    reference: Any = None,
    label: str = "given text",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model's perplexity on a text, and its distance from a reference model.

    The text is cut into windows that do not overlap; each predicts its tokens from the second on. A last, partial
    window is dropped, unless it is the only one.

    Parameters
    ----------
    model, tokenizer : Any
        A causal language model of transformers and its tokenizer.
    text : str
        Text to read.
    window : int
        Tokens in a window.
    max_tokens : int, optional
        Read no more than this many tokens.
    reference : Any, optional
        Model to compare with, over the same vocabulary.
    label : str
        Name of the text, for the result.
    progress : callable, optional
        Called with the windows done and their total.

    Returns
    -------
    Evaluation
    """
    windows = _windows(tokenizer, text, window, max_tokens)
    largest = int(windows.max())
    for judged in (model, reference):
        known = largest + 1 if judged is None else int(judged.get_input_embeddings().weight.shape[0])
        if largest >= known:
            raise GlobeError(f"the tokenizer gives token {largest}, a model knows {known}; it is of another model")
    started = time.perf_counter()
    batch = _batch(model, windows.shape[1])
    loss = reference_loss = divergence = 0.0
    agreed = done = 0
    with torch.no_grad():
        for ids in torch.split(windows, batch):
            logits = _logits(model, ids)
            targets = ids[:, 1:].reshape(-1).to(logits.device)
            loss += _loss(logits, targets)
            if reference is not None:
                expected = _logits(reference, ids).to(logits.device)
                if expected.shape != logits.shape:
                    raise GlobeError(
                        f"the models differ in vocabulary: {logits.shape[1]} tokens against {expected.shape[1]}"
                    )
                reference_loss += _loss(expected, targets)
                divergence += _divergence(expected, logits)
                agreed += int((expected.argmax(1) == logits.argmax(1)).sum())
            done += len(ids)
            if progress is not None:
                progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    if not math.isfinite(loss + reference_loss):
        raise GlobeError("the model's logits are not finite; its weights or its compute type are damaged")
    return Evaluation(
        perplexity=_perplexity(loss, tokens),
        tokens=tokens,
        window=windows.shape[1],
        text=label,
        kl=None if reference is None else divergence / tokens,
        top1_agreement=None if reference is None else agreed / tokens,
        reference_perplexity=None if reference is None else _perplexity(reference_loss, tokens),
        seconds=time.perf_counter() - started,
    )


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
    _check_window(window, max_tokens)
    model, tokenizer = load_model(directory, device, trust_remote_code=trust_remote_code)
    reference = None
    if against is not None:
        reference, its_tokenizer = load_model(against, device, trust_remote_code=trust_remote_code)
        _check_same_tokenizer(Path(directory), tokenizer, Path(against), its_tokenizer)
    options: dict[str, Any] = {"window": window, "max_tokens": max_tokens, "reference": reference, "progress": progress}
    return [evaluate_models(model, tokenizer, content, label=label, **options) for content, label in read]


def geometric_mean(found: Sequence[Evaluation]) -> float:
    """Of the perplexities, each over its reference's where there is one.

    Raises
    ------
    UsageError
        If there is none.
    """
    if not found:
        raise UsageError("no evaluation is given; expected at least one")
    logs = [math.log(each.perplexity / (each.reference_perplexity or 1.0)) for each in found]
    mean = sum(logs) / len(logs)
    return math.exp(mean) if mean < 700 else math.inf


def _check_window(window: int, max_tokens: int | None) -> None:
    if window < 2:
        raise UsageError(f"window must be at least 2 tokens, not {window}")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"max tokens must be at least 2, not {max_tokens}")


def _check_same_tokenizer(directory: Path, tokenizer: Any, against: Path, its_tokenizer: Any) -> None:
    if len(tokenizer) != len(its_tokenizer):
        raise GlobeError(
            f"{directory} has a tokenizer of {len(tokenizer)} tokens, {against} one of {len(its_tokenizer)}; "
            "compare models with the same tokenizer"
        )
    if tokenizer.get_vocab() != its_tokenizer.get_vocab():
        raise GlobeError(f"{directory} and {against} have tokenizers with different tokens")


def _windows(tokenizer: Any, text: str, window: int, max_tokens: int | None) -> torch.Tensor:
    _check_window(window, max_tokens)
    if not text.strip():
        raise GlobeError("the text is empty")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise GlobeError(f"the text has {len(ids)} token(s); at least 2 are needed")
    window = min(window, len(ids))
    count = len(ids) // window
    return torch.tensor(ids[: count * window]).view(count, window)


def _batch(model: Any, window: int) -> int:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, min(_MOST_WINDOWS, _LOGIT_BYTES // (4 * window * vocabulary)))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]).float()


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return functional.cross_entropy(logits, targets, reduction="none").cpu().double().sum().item()


def _divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    total = 0.0
    for p, q in zip(torch.split(expected, _KL_ROWS), torch.split(logits, _KL_ROWS), strict=True):
        rows = functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True)
        total += rows.sum(1).cpu().double().sum().item()
    return total


def _perplexity(loss: float, tokens: int) -> float:
    mean = loss / tokens
    return math.exp(mean) if mean < 700 else math.inf
