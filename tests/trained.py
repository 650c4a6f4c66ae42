"""A small mixture with a router of its own, trained for seconds on the documentation that Python carries."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from checkpoints import LAYOUTS, byte_tokenizer
from globe.statistics.texts import evaluation_text

STEPS, WINDOWS, WINDOW = 120, 16, 96


def train_small(target: Path, steps: int = STEPS) -> Path:
    """Write a bf16 OLMoE checkpoint whose experts differ, with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    tokens = torch.tensor(tokenizer(evaluation_text("calibration")[: 1 << 18])["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LAYOUTS["olmoe"]()
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(steps):
            starts = torch.randint(len(tokens) - WINDOW, (WINDOWS,))
            batch = torch.stack([tokens[start : start + WINDOW] for start in starts])
            model(batch, labels=batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert isinstance(model, transformers.PreTrainedModel)
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
