"""Tiny models of every architecture of transformers that has routed experts, from its own configuration class."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS, HIDDEN, VOCABULARY = 3, 32, 264
_SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "emb_dim", "embed_dim", "out_hidden_size", "decoder_hidden_size"), HIDDEN
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads", "n_groups", "num_sliding_attention_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "projection_intermediate_size"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "mamba_d_state", "ssm_state_size", "mamba_d_head"), 16
    ),
    **dict.fromkeys(("mamba_head_dim", "sliding_window", "max_window_layers", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "zero_expert_num", "num_kv_shared_layers"), 0),
    "num_nextn_predict_layers": 0,
    "moe_hidden_size": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 512,
    "qk_head_dim": 16,
    "index_topk": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_position_embeddings": 16,
}
_ROTARY = {"rope_theta": 10_000.0, "rope_type": "default"}
_SPARSE = ["dense", "sparse", "sparse"]
_GEMMA = {
    "per_layer_config": {},
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
}
_MODEL_TYPES = {"inkling": "inkling_mm_model"}  # by folder, where that is not it
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts_per_token": 2, "num_expert_group": 1},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _SPARSE, "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": _GEMMA},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {
            "per_layer_config": {},
            "head_dim": 16,
            "layer_types": ["indexed_attention"] * LAYERS,
            "mlp_layer_types": _SPARSE,
            "shared_experts_intermediate_size": 24,
        },
        "vision_config": {
            "adapter_in_dim": HIDDEN,
            "adapter_out_dim": HIDDEN,
            "mlp_layer_types": _SPARSE,
            "per_layer_config": {n: {"num_local_experts": 4, "num_experts_per_tok": 2} for n in (1, 2)},
        },
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24],
            "mlp_layer_types": _SPARSE,
            "rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]},
        }
    },
    "gemma4": {"text_config": {**_GEMMA, "pad_token_id": 0}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_kpool": 4, "qk_rope_head_dim": 0}},
    "hunyuan_v1_moe": {"rope_parameters": _ROTARY, "head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "kimi_linear": {"num_experts_per_token": 2, "num_expert_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2]}},
    "mistral4": {"rope_parameters": _ROTARY},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp": {
        "text_config": {
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
        }
    },
    "step3p7": {"text_config": {"pad_token_id": 0, "sliding_window": 16}},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """The model types whose modelling code in the installed transformers has a module of routed experts."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    found = []
    for path in sorted(folder.glob("*/modeling_*.py")):
        if re.search(r"class \w*Experts\w*\(nn\.Module\)", path.read_text(encoding="utf-8")):
            found.append(path.parent.name)
    return sorted(set(found))


def tiny_config(model_type: str) -> Any:
    """A configuration of a model type of a few small layers, the first dense where that is its way."""
    config = transformers.AutoConfig.for_model(_MODEL_TYPES.get(model_type, model_type))
    values = _shrunk(config.to_dict())
    for name, value in _SPECIAL.get(model_type, {}).items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return type(config).from_dict(values)


def tiny_model(model_type: str) -> Any:
    """A model of `tiny_config`, random weights in bf16; None where transformers has no class that generates text."""
    config = tiny_config(model_type)
    autos = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    for auto in (getattr(transformers, name) for name in autos):
        if type(config) in auto._model_mapping:
            torch.manual_seed(0)
            return auto.from_config(config, dtype=torch.bfloat16).eval()
    return None


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layers = next((values[name] for name in ("num_hidden_layers", "num_layers", "n_layers") if name in values), None)
    for name, value in values.items():
        if isinstance(value, dict) and ("model_type" in value or name.endswith("config")):
            found[name] = _shrunk(value)
        elif name in _SMALL and type(value) is int:
            found[name] = _SMALL[name]
        elif name in _SMALL and type(value) is list and all(type(each) is int for each in value):
            found[name] = [_SMALL[name]] * len(value)
        elif type(value) is list and layers is not None and len(value) == layers:
            found[name] = [*value[:1], *value[1 - LAYERS :]]
        elif name == "per_layer_config":
            continue
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found[name] = None
        else:
            found[name] = value
    if "kv_lora_rank" in found and "num_attention_heads" in found:  # latent attention: a head of its own for each
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
