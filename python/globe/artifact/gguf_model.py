"""What llama.cpp has to be told of a model, and which models it computes as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from globe.errors import GlobeError

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """GGUF's name of an architecture and where llama.cpp's form of it differs.

    Parameters
    ----------
    name : str
        In GGUF.
    renormalised : bool
        Whether the weights of a token's experts are made to sum to one; `norm_topk_prob` has to be that.
    paired : bool
        Whether rotary positions turn neighbouring rows of a head, not rows half a head apart.
    own_head : bool
        Whether a head is expected that is not the embedding.
    """

    name: str
    renormalised: bool
    paired: bool = False
    own_head: bool = False

    def ordered(self, name: str, values: torch.Tensor, config: Config) -> torch.Tensor:
        """Rows of queries and keys in the order that its rotary positions expect."""
        if not self.paired or not name.endswith(("attn_q.weight", "attn_k.weight")):
            return values
        heads = config["num_attention_heads"] if name.endswith("attn_q.weight") else _key_heads(config)
        found: torch.Tensor = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
        return found


ARCHITECTURES = {
    "mixtral": Architecture("llama", renormalised=True, paired=True),
    "olmoe": Architecture("olmoe", renormalised=False, own_head=True),
    "qwen2_moe": Architecture("qwen2moe", renormalised=False, own_head=True),
    "qwen3_moe": Architecture("qwen3moe", renormalised=True),
}


def architecture_of(source: Path, config: Config) -> Architecture:
    """The architecture of a model.

    Raises
    ------
    GlobeError
        If it is not one of `ARCHITECTURES`, or config.json asks for what llama.cpp does not do in it.
    """
    kind = config.get("model_type")
    found = ARCHITECTURES.get(str(kind))
    if found is None:
        raise GlobeError(
            f"{source}: model type {kind} found, GGUF is written of {', '.join(ARCHITECTURES)}: leave out --gguf-type, "
            "and use llama.cpp's own converter"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    expected: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "hidden_act": ("silu", lambda value: value in (None, "silu")),
        "rope_type": ("default", lambda value: value in (None, "default")),
        "partial_rotary_factor": (1, lambda value: value in (None, 1)),
        "clip_qkv": (None, lambda value: value is None),
        "sliding_window": (None, lambda value: value is None or not _slides(config)),
    }
    if kind != "mixtral":
        expected["norm_topk_prob"] = (found.renormalised, lambda value: bool(value) == found.renormalised)
    if found.own_head:  # written for as many rows of attention as the model is wide
        expected["head_dim"] = (width // heads, lambda value: value in (None, width // heads))
    if kind == "olmoe":
        expected["num_key_value_heads"] = (heads, lambda value: value in (None, heads))
    for key, (wanted, holds) in expected.items():
        value = rope.get(key, rope.get("type")) if key == "rope_type" else config.get(key, rope.get(key))
        if not holds(value):
            raise GlobeError(
                f"{source}: config.json has {key} {value!r}, llama.cpp's {found.name} takes {wanted!r}: leave out "
                "--gguf-type"
            )
    return found


def describe(writer: Any, config: Config, architecture: Architecture, file_type: int) -> None:
    """Write the model's sizes and constants to a GGUFWriter."""
    rope = config.get("rope_parameters") or {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    experts = next(config[key] for key in ("num_experts", "num_local_experts") if key in config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _key_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _slides(config: Config) -> bool:
    """Whether a window that is stated is used: Qwen's configurations state one that is not."""
    return bool(config.get("use_sliding_window", True))
