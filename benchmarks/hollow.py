"""Checkpoints of published sizes that take no room: whole headers, names and shapes, and holes for the weights.

python -m benchmarks.hollow DIR [--like deepseek-v3] [--experts N] [--noise]

With noise the experts of the one layer that has some are random codes, to be compressed.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

_BYTES = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F32": 4}
_SHARD = 4_300_000_000


@dataclass(frozen=True)
class Model:
    """The sizes of DeepSeek-V3 and of what is built like it."""

    layers: int = 61
    dense: int = 3
    experts: int = 256
    hidden: int = 7168
    width: int = 2048
    dense_width: int = 18432
    vocabulary: int = 129_280
    heads: int = 128
    query_rank: int = 1536
    key_rank: int = 512
    block: int = 128


@dataclass(frozen=True)
class Mxfp4:
    """The sizes of gpt-oss-20b, of one layer of it."""

    layers: int = 1
    experts: int = 32
    hidden: int = 2880
    width: int = 2880
    vocabulary: int = 201_088
    heads: int = 64
    key_heads: int = 8


LIKE: dict[str, Model | Mxfp4] = {"deepseek-v3": Model(), "one-layer": Model(layers=4), "gpt-oss-20b-layer": Mxfp4()}


def tensors_of(model: Model | Mxfp4) -> Iterator[Entry]:
    """Every tensor as published."""
    return tensors(model) if isinstance(model, Model) else _mxfp4(model)


def _mxfp4(model: Mxfp4) -> Iterator[Entry]:
    d, wide = model.hidden, 64 * model.heads
    yield "model.embed_tokens.weight", "BF16", (model.vocabulary, d)
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", wide), ("k", 64 * model.key_heads), ("v", 64 * model.key_heads)):
            yield f"{at}.self_attn.{name}_proj.weight", "BF16", (rows, d)
            yield f"{at}.self_attn.{name}_proj.bias", "BF16", (rows,)
        yield f"{at}.self_attn.o_proj.weight", "BF16", (d, wide)
        yield f"{at}.self_attn.o_proj.bias", "BF16", (d,)
        yield f"{at}.self_attn.sinks", "BF16", (model.heads,)
        yield f"{at}.mlp.router.weight", "BF16", (model.experts, d)
        yield f"{at}.mlp.router.bias", "BF16", (model.experts,)
        for name, rows, columns in (("gate_up", 2 * model.width, d), ("down", d, model.width)):
            yield f"{at}.mlp.experts.{name}_proj_blocks", "U8", (model.experts, rows, columns // 32, 16)
            yield f"{at}.mlp.experts.{name}_proj_scales", "U8", (model.experts, rows, columns // 32)
            yield f"{at}.mlp.experts.{name}_proj_bias", "BF16", (model.experts, rows)
        yield f"{at}.input_layernorm.weight", "BF16", (d,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (d,)
    yield "model.norm.weight", "BF16", (d,)
    yield "lm_head.weight", "BF16", (model.vocabulary, d)


def tensors(model: Model) -> Iterator[Entry]:
    """Every tensor as published: weights of products in fp8 with a scale for each block, the rest in bf16 and fp32."""
    yield "model.embed_tokens.weight", "BF16", (model.vocabulary, model.hidden)
    for layer in range(model.layers + 1):
        at = f"model.layers.{layer}"
        yield from _attention(model, f"{at}.self_attn")
        yield f"{at}.input_layernorm.weight", "BF16", (model.hidden,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (model.hidden,)
        if layer < model.dense:
            yield from _mlp(model, f"{at}.mlp", model.dense_width)
            continue
        yield f"{at}.mlp.gate.weight", "BF16", (model.experts, model.hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (model.experts,)
        for expert in range(model.experts):
            yield from _mlp(model, f"{at}.mlp.experts.{expert}", model.width)
        yield from _mlp(model, f"{at}.mlp.shared_experts", model.width)
        if layer == model.layers:  # predicts a token further on
            yield f"{at}.embed_tokens.weight", "BF16", (model.vocabulary, model.hidden)
            yield f"{at}.eh_proj.weight", "BF16", (model.hidden, 2 * model.hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", "BF16", (model.hidden,)
            yield f"{at}.shared_head.head.weight", "BF16", (model.vocabulary, model.hidden)
    yield "model.norm.weight", "BF16", (model.hidden,)
    yield "lm_head.weight", "BF16", (model.vocabulary, model.hidden)


def _attention(model: Model, at: str) -> Iterator[Entry]:
    nope, rope, value = 128, 64, 128
    yield from _product(model, f"{at}.q_a_proj", (model.query_rank, model.hidden))
    yield f"{at}.q_a_layernorm.weight", "BF16", (model.query_rank,)
    yield from _product(model, f"{at}.q_b_proj", (model.heads * (nope + rope), model.query_rank))
    yield from _product(model, f"{at}.kv_a_proj_with_mqa", (model.key_rank + rope, model.hidden))
    yield f"{at}.kv_a_layernorm.weight", "BF16", (model.key_rank,)
    yield from _product(model, f"{at}.kv_b_proj", (model.heads * (nope + value), model.key_rank))
    yield from _product(model, f"{at}.o_proj", (model.hidden, model.heads * value))


def _mlp(model: Model, at: str, width: int) -> Iterator[Entry]:
    yield from _product(model, f"{at}.gate_proj", (width, model.hidden))
    yield from _product(model, f"{at}.up_proj", (width, model.hidden))
    yield from _product(model, f"{at}.down_proj", (model.hidden, width))


def _product(model: Model, at: str, shape: tuple[int, int]) -> Iterator[Entry]:
    yield f"{at}.weight", "F8_E4M3", shape
    yield f"{at}.weight_scale_inv", "F32", (-(-shape[0] // model.block), -(-shape[1] // model.block))


def write_hollow(directory: Path, model: Model | Mxfp4, noise: bool = False) -> None:
    """Write config.json, the index, and shards that end in holes, or have random experts."""
    directory.mkdir(parents=True)
    shards: list[list[Entry]] = [[]]
    size = total = 0
    for entry in tensors_of(model):
        nbytes = _BYTES[entry[1]] * math.prod(entry[2])
        if size + nbytes > _SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + nbytes, total + nbytes
    index: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _write_shard(directory / name, entries, noise)
        index.update({entry[0]: name for entry in entries})
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(described), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(_config(model), indent=1), encoding="utf-8")


def _write_shard(path: Path, entries: list[Entry], noise: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        first, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
        for name, dtype, shape in entries if noise else []:
            if ".experts." in name:
                file.seek(8 + len(raw) + header[name]["data_offsets"][0])  # type: ignore[index]
                file.write(_random(name, dtype, math.prod(shape)))


def _random(name: str, dtype: str, count: int) -> bytes:
    """Codes that are numbers, or scales that make weights of usual sizes of them."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if dtype == "F32":
        return random.uniform(1e-4, 2e-4, count).astype(np.float32).tobytes()
    if dtype == "BF16":
        return bytes(2 * count)
    if name.endswith("_scales"):
        return random.integers(118, 122, count, np.uint8).tobytes()
    return (random.integers(0, 256, count, np.uint8) & (0xF7 if dtype == "F8_E4M3" else 0xFF)).tobytes()


def _config(model: Model | Mxfp4) -> dict[str, object]:
    if isinstance(model, Mxfp4):
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": model.hidden,
            "intermediate_size": model.width,
            "num_hidden_layers": model.layers,
            "num_local_experts": model.experts,
            "num_experts_per_tok": 4,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.key_heads,
            "vocab_size": model.vocabulary,
            "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "mxfp4"},
        }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": model.hidden,
        "intermediate_size": model.dense_width,
        "moe_intermediate_size": model.width,
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.dense,
        "moe_layer_freq": 1,
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": model.heads,
        "q_lora_rank": model.query_rank,
        "kv_lora_rank": model.key_rank,
        "num_nextn_predict_layers": 1,
        "vocab_size": model.vocabulary,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [model.block, model.block],
        },
    }


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--like", type=click.Choice(sorted(LIKE)), default="deepseek-v3", show_default=True)
@click.option("--experts", type=int, help="As many in a layer, instead of as published.")
@click.option("--noise", is_flag=True, help="Fill the experts with random codes.")
def main(directory: Path, like: str, experts: int | None, noise: bool) -> None:
    model = LIKE[like]
    write_hollow(directory, replace(model, experts=experts) if experts else model, noise)


if __name__ == "__main__":
    main()
