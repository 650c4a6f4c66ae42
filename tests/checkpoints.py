"""Tiny mixture checkpoints, one per on-disk layout, written by transformers itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from globe import calibrate
from globe.statistics.calibration import Calibration
from globe.statistics.texts import evaluation_text

# More rows than the 256 byte tokens: the tokenizer class of some architectures adds a special token.
VOCABULARY = 264
HIDDEN = 64
TOKENS, WINDOW = 640, 64  # of calibrate_tiny

Builder = Callable[[], Any]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def _layout(config_name: str, model_name: str, **settings: Any) -> Builder:
    def build() -> Any:
        config = getattr(transformers, config_name)(**{**_COMMON, **settings})
        return getattr(transformers, model_name)(config)

    return build


LAYOUTS: dict[str, Builder] = {
    "qwen2_moe": _layout(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=6,
    ),
    "qwen3_moe": _layout(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        mlp_only_layers=[1],
    ),
    "olmoe": _layout(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        num_key_value_heads=4,
        intermediate_size=32,
        num_experts=8,
    ),
    "deepseek_v2": _layout(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        num_hidden_layers=3,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=2,
        **_LATENT,
    ),
    "deepseek_v3": _layout(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        num_hidden_layers=3,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        **_LATENT,
    ),
    "glm4_moe": _layout(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
    ),
    "mixtral": _layout(
        "MixtralConfig",
        "MixtralForCausalLM",
        intermediate_size=48,
        num_local_experts=4,
    ),
    "phimoe": _layout(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        intermediate_size=48,
        num_local_experts=4,
    ),
    "minimax": _layout(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        head_dim=16,
        intermediate_size=48,
        num_local_experts=4,
        block_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "minimax_m2": _layout(
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        head_dim=16,
        intermediate_size=48,
        num_local_experts=4,
    ),
    "qwen3_5_moe": _layout(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=32,
        num_experts=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granitemoe": _layout(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        intermediate_size=48,
        num_local_experts=4,
    ),
    "llama4_text": _layout(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=48,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        moe_layers=[0, 2],
    ),
}

# transformers would split the experts of these on saving, but their published files hold them fused, as [E, 2p, d].
FUSED_ON_DISK = frozenset({"qwen3_5_moe"})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every byte and no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_tiny(layout: str, target: Path, *, dtype: str = "bfloat16", shards: int = 1, seed: int = 0) -> Path:
    """Write a tiny checkpoint of one layout, with random weights and a byte tokenizer.

    Parameters
    ----------
    layout : str
        A key of `LAYOUTS`.
    target : Path
        Directory to create.
    dtype : str
        Name of the torch type of the stored weights.
    shards : int
        Number of safetensors files; more than one also writes an index.
    seed : int
        Seed of the weights.

    Returns
    -------
    Path
        `target`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LAYOUTS[layout]()
    model.to(getattr(torch, dtype)).save_pretrained(target, save_original_format=layout not in FUSED_ON_DISK)
    byte_tokenizer().save_pretrained(target)
    if shards > 1:
        _split(target, shards)
    return target


def _split(target: Path, shards: int) -> None:
    single = target / "model.safetensors"
    tensors = load_file(single)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_chunks(list(tensors), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    single.unlink()


def _chunks(names: list[str], count: int) -> Iterator[list[str]]:
    if count > len(names):
        raise ValueError(f"{len(names)} tensors cannot fill {count} shards")
    edges = [len(names) * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield names[start:stop]


def calibrate_tiny(model: Path, path: Path, **options: Any) -> Calibration:
    """Activation statistics of a tiny checkpoint, of the first TOKENS tokens of a text unless told otherwise."""
    usual = {"text": evaluation_text("calibration")[:TOKENS], "tokens": TOKENS, "window": WINDOW}
    return calibrate(model, path, **{**usual, **options})
