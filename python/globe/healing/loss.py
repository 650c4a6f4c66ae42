"""KL(original‖model) of the next token, with its gradient; perplexity on windows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

_LOGIT_BYTES = 256 << 20
_ROW_BYTES = 4 << 20  # of logits in fp32


def micro_batch(model: Any, window: int) -> int:
    """Windows whose logits are in memory together."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, _LOGIT_BYTES // (4 * window * vocabulary))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary), in the model's dtype, of windows (n, window)."""
    found: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found.flatten(0, 1)


def learn(model: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Add the gradient of the mean KL of the windows' tokens to the parameters' `grad`; the mean KL, in nats."""
    tokens, total = windows.numel(), 0.0
    for ids in windows.split(micro_batch(model, windows.shape[1])):
        with torch.no_grad():
            expected = logits(teacher, ids)
        found = logits(model, ids)
        value, gradient = divergence(expected.to(found.device), found.detach(), 1.0 / tokens)
        total += value
        found.backward(gradient)
    return total / tokens


def divergence(expected: torch.Tensor, found: torch.Tensor, scale: float = 1.0) -> tuple[float, torch.Tensor]:
    """The sum over rows of KL(softmax expected‖softmax found) in fp32, and its gradient in `found`, scaled.

    A few rows at a time: what is made of them on the way stays in a core's cache.
    """
    gradient, values = torch.empty_like(found), []
    rows = max(1, _ROW_BYTES // (4 * found.shape[1]))
    for some in range(0, len(found), rows):
        here = slice(some, some + rows)
        log_p, log_q = expected[here].float().log_softmax(1), found[here].float().log_softmax(1)
        p = log_p.exp()
        values.append(torch.linalg.vecdot(p, log_p.sub_(log_q)))
        torch.mul(log_q.exp_().sub_(p), scale, out=gradient[here])
    return torch.cat(values).cpu().double().sum().item(), gradient


def perplexities(model: Any, held: dict[str, torch.Tensor]) -> dict[str, float]:
    """A model's perplexity on the windows of every text; infinite where its logits are not finite."""
    return {label: _perplexity(model, windows) for label, windows in held.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _perplexity(model: Any, windows: torch.Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for ids in windows.split(micro_batch(model, windows.shape[1])):
            found = logits(model, ids).view(*ids.shape, -1)[:, :-1].flatten(0, 1).float()
            losses = functional.cross_entropy(found, ids[:, 1:].flatten().to(found.device), reduction="none")
            total += losses.cpu().double().sum().item()
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
