"""Perplexity of a loaded model, and how far it moved from the model it was made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from globe.errors import GlobeError, UsageError
from globe.statistics.windows import first_tokens

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
    calibrated : bool
        Whether the text is the held-out half of a kind that the model was calibrated on.
    """

    perplexity: float
    tokens: int
    window: int
    text: str
    kl: float | None
    top1_agreement: float | None
    reference_perplexity: float | None
    seconds: float
    calibrated: bool = False

    @property
    def ratio(self) -> float:
        """Perplexity, over the reference's where there is one."""
        return self.perplexity / (self.reference_perplexity or 1.0)


def evaluate_models(
    model: Any,
    tokenizer: Any,
    text: str | torch.Tensor,
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
    text : str or torch.Tensor
        Text to read; or token ids (n, length), which are windows already.
    window : int
        Tokens in a window, of a text.
    max_tokens : int, optional
        Read no more than this many tokens, but of windows at least one.
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
    windows = _windows(tokenizer, text, window, max_tokens) if isinstance(text, str) else _first(text, max_tokens)
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


def geometric_mean(found: Sequence[Evaluation]) -> float:
    """Of the perplexities, each over its reference's where there is one.

    Raises
    ------
    UsageError
        If there is none.
    """
    if not found:
        raise UsageError("no evaluation is given; expected at least one")
    logs = [math.log(each.ratio) for each in found]
    mean = sum(logs) / len(logs)
    return math.exp(mean) if mean < 700 else math.inf


def check_window(window: int, max_tokens: int | None) -> None:
    """Refuse numbers of tokens that cannot be.

    Raises
    ------
    UsageError
        Says which.
    """
    if window < 2:
        raise UsageError(f"window must be at least 2 tokens, not {window}")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"max tokens must be at least 2, not {max_tokens}")


def _windows(tokenizer: Any, text: str, window: int, max_tokens: int | None) -> torch.Tensor:
    check_window(window, max_tokens)
    if not text.strip():
        raise GlobeError("the text is empty")
    if max_tokens is None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = first_tokens(tokenizer, text, max_tokens)
    if len(ids) < 2:
        raise GlobeError(f"the text has {len(ids)} token(s); at least 2 are needed")
    window = min(window, len(ids))
    count = len(ids) // window
    return torch.tensor(ids[: count * window]).view(count, window)


def _first(windows: torch.Tensor, max_tokens: int | None) -> torch.Tensor:
    return windows if max_tokens is None else windows[: max(1, max_tokens // windows.shape[1])]


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
