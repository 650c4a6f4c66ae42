"""A small mixture with a router of its own, trained here: Qwen3-MoE, 6 layers of 32 experts, 4 to a token.

    python -m benchmarks.train_mixture OUT [--minutes 30] [--texts FOLDER] [--seed 0]

It learns from what Debian's packages of documentation and dictionaries carry, which apt-get fetches, or from FOLDER's
.txt files; every twentieth part of a text is kept in OUT/held-out.txt. It has a tokenizer of its own. A weak language
model, but one whose experts have come to differ.
"""

from __future__ import annotations

import gzip
import html
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

PACKAGES = ("dict-gcide", "dict-jargon", "dict-foldoc", "dict-wn", "developers-reference", "debian-policy", "git-doc")
VOCABULARY, WINDOW, BATCH, RATE = 4096, 256, 24, 3e-3
_MOST = 8_000_000  # characters of a file
_PART = 20_000  # characters; every twentieth is held out
_END = "<|endoftext|>"
_WARM_STEPS = 50


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--texts", type=click.Path(path_type=Path, exists=True), help="In place of Debian's packages.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, minutes: float, texts: Path | None, seed: int) -> None:
    parts = [text[at : at + _PART] for text in _texts(texts) for at in range(0, min(len(text), _MOST), _PART)]
    taught = [part for number, part in enumerate(parts) if number % 20 != 19]
    tokenizer = _tokenizer(taught)
    click.echo(f"{sum(map(len, taught)) / 1e6:.1f} million characters, {len(parts) - len(taught)} parts held out")
    ids = torch.cat([torch.tensor(tokenizer(part + _END)["input_ids"]) for part in taught])
    model = _train(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW), minutes, seed)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "held-out.txt").write_text("\n".join(parts[19::20]), encoding="utf-8")


def _train(windows: torch.Tensor, minutes: float, seed: int) -> Qwen3MoeForCausalLM:
    """AdamW in fp32 with products in bf16; the rate falls along a cosine over the minutes."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=384,
            moe_intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1.0:
        rate = RATE * min(1.0, (step + 1) / _WARM_STEPS) * max(0.02, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = windows[torch.randint(len(windows), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            click.echo(f"step {step}, {(time.monotonic() - began) / 60:.1f} min: loss {float(loss):.3f}")
        step, done = step + 1, (time.monotonic() - began) / (60 * minutes)
    click.echo(f"{step} steps of {BATCH * WINDOW} tokens: loss {float(loss):.3f}")
    return model


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)


def _texts(folder: Path | None) -> Iterator[str]:
    if folder is not None:
        yield from (file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.txt")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, capture_output=True)
        for file in sorted(Path(scratch).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(file), str(Path(scratch, file.stem))], check=True)
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file() and not file.is_symlink():
                yield _read(file)


def _read(file: Path) -> str:
    """The text of a dictionary or a page of HTML; nothing of others."""
    name = file.name.removesuffix(".dz").removesuffix(".gz")
    if Path(name).suffix not in (".dict", ".html"):
        return ""
    text = (gzip.decompress(file.read_bytes()) if name != file.name else file.read_bytes()).decode(errors="replace")
    if name.endswith(".html"):
        text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", text))
        text = re.sub(r"\n\s*\n+", "\n\n", text)
    return text


if __name__ == "__main__":
    main()
