"""KL(original‖model) of the next token, with its gradient; perplexity on windows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

_LOGIT_BYTES = 256 << 20


def micro_batch(model: Any, window: int) -> int:
    """Windows whose logits are in memory together."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, _LOGIT_BYTES // (4 * window * vocabulary))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) in fp32 of windows (n, window)."""
    found: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found.flatten(0, 1).float()


def learn(model: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Add the gradient of the mean KL of the windows' tokens to the parameters' `grad`; the mean KL, in nats."""
    tokens, total = windows.numel(), 0.0
    for ids in windows.split(micro_batch(model, windows.shape[1])):
        with torch.no_grad():
            expected = logits(teacher, ids)
        found = logits(model, ids)
        value, gradient = divergence(expected.to(found.device), found.detach())
        total += value
        found.backward(gradient.div_(tokens))
    return total / tokens


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The sum over rows of KL(softmax expected‖softmax found), and its gradient in `found`."""
    with torch.no_grad():
        log_p, log_q = expected.log_softmax(1), found.log_softmax(1)
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q)).cpu().double().sum().item()
        return value, log_q.exp_().sub_(p)


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
            found = logits(model, ids).view(*ids.shape, -1)[:, :-1].flatten(0, 1)
            losses = functional.cross_entropy(found, ids[:, 1:].flatten().to(found.device), reduction="none")
            total += losses.cpu().double().sum().item()
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
