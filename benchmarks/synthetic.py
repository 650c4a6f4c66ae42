"""A checkpoint with the names and shapes of a known model and random weights that have something to find.

python -m benchmarks.synthetic DIR --like qwen1.5-moe-a2.7b [--layers K] [--statistics FILE] [--zero-down]

An expert matrix is a random left factor times a sparse mixture of a few shared atoms, with its rows in any order,
plus noise that holds a tenth of the energy: a fit of the right kind can reach a relative error of 0.1. Statistics are
of inputs whose energy falls along random directions as 1/k, and of rows that count by up to ten times differently.
Zeros take no room after `fallocate --dig-holes FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import TensorWriter, write_text
from globe.statistics.calibration import LayerStatistics, save_calibration

NOISE = 0.1  # share of the energy


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2-MoE checkpoint."""

    layers: int
    experts: int
    p: int
    d: int
    vocabulary: int
    heads: int
    shared: int
    """Rows of the shared expert."""
    shard_bytes: int = 4_000_000_000


LIKE = {
    "qwen1.5-moe-a2.7b": Shape(24, 60, 1408, 2048, 151_936, 16, 5632),
    "tiny": Shape(4, 8, 96, 128, 512, 4, 192, shard_bytes=1 << 20),
}


def write_synthetic(directory: Path, shape: Shape, seed: int = 0, *, zero_down: bool = False) -> None:
    """Write the checkpoint, with every `down` of zeros if that is asked for; the same seed gives the same bytes."""
    directory.mkdir(parents=True)
    plan = list(_tensors(shape))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in plan:
        nbytes = 2 * int(torch.Size(dims).numel())
        if size + nbytes > shape.shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += nbytes
    make = _Weights(shape, seed)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {name: ("BF16", dims) for name, dims in shard}
        with TensorWriter(directory / file, layout, {"format": "pt"}) as writer:
            for name, dims in shard:
                empty = zero_down and "down_proj" in name
                writer.write(name, torch.zeros(dims, dtype=torch.bfloat16) if empty else make(name, dims))
                index[name] = file
    total = 2 * sum(int(torch.Size(dims).numel()) for _, dims in plan)
    described = {"metadata": {"total_size": total}, "weight_map": index}
    write_text(directory / "model.safetensors.index.json", json.dumps(described, indent=1))
    write_text(directory / "config.json", json.dumps(_config(shape), indent=1))


def write_statistics(directory: Path, file: Path, shape: Shape, seed: int = 0) -> None:
    """Write activation statistics for the synthetic checkpoint in a directory, without moments of the rows."""
    random = torch.Generator().manual_seed(seed)
    energy = 1 / torch.arange(1, shape.d + 1)
    layers = {}
    for layer in range(shape.layers):
        directions = torch.linalg.qr(torch.randn(shape.d, shape.d, generator=random))[0]
        moment = (directions * (energy / energy.mean())) @ directions.T
        gate, up, hidden = (10 ** torch.rand(shape.experts, shape.p, generator=random) for _ in range(3))
        layers[layer] = LayerStatistics(
            moment=(moment + moment.T) / 2,
            residual=torch.tensor(1.0),
            share=torch.full((shape.experts,), 1 / shape.experts),
            counts=torch.full((shape.experts,), 1024),
            diagonal=moment.diagonal().repeat(shape.experts, 1),
            gate_rows=gate,
            up_rows=up,
            hidden=hidden,
        )
    about = {"fingerprint": Checkpoint(directory).fingerprint(), "text": "none: synthetic", "tokens": 0, "window": 0}
    save_calibration(file, layers, about)


class _Weights:
    """Makes one tensor after another."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.rank = max(1, shape.p // 2)
        self.atoms = torch.randn(16, self.rank, shape.d, generator=self.random)
        self.noise = torch.randn(2 * shape.p * shape.d, generator=self.random)

    def __call__(self, name: str, dims: tuple[int, ...]) -> torch.Tensor:
        if ".experts." not in name:
            return (0.02 * torch.randn(dims, generator=self.random)).bfloat16()
        p, d = dims if "down_proj" not in name else dims[::-1]
        chosen = torch.randperm(len(self.atoms), generator=self.random)[:4]
        weights = torch.rand(4, generator=self.random)
        left = torch.randn(p, self.rank, generator=self.random)
        matrix = left @ torch.tensordot(weights / weights.norm(), self.atoms[chosen], 1)
        start = int(torch.randint(self.noise.numel() - p * d, (1,), generator=self.random))
        noise = self.noise[start : start + p * d].view(p, d)  # a window of one pool: fresh normals cost more than GEMMs
        matrix = (1 - NOISE) ** 0.5 * matrix / self.rank**0.5 + NOISE**0.5 * noise
        return (0.02 * (matrix if "down_proj" not in name else matrix.T)).bfloat16().contiguous()


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = shape.d
    yield "model.embed_tokens.weight", (shape.vocabulary, d)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for letter in "qkv":
            yield f"{at}.self_attn.{letter}_proj.weight", (d, d)
            yield f"{at}.self_attn.{letter}_proj.bias", (d,)
        yield f"{at}.self_attn.o_proj.weight", (d, d)
        for expert in range(shape.experts):
            for family, dims in _projections(shape.p, d):
                yield f"{at}.mlp.experts.{expert}.{family}_proj.weight", dims
        for family, dims in _projections(shape.shared, d):
            yield f"{at}.mlp.shared_expert.{family}_proj.weight", dims
        yield f"{at}.mlp.shared_expert_gate.weight", (1, d)
        yield f"{at}.mlp.gate.weight", (shape.experts, d)
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (shape.vocabulary, d)


def _projections(p: int, d: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate", (p, d)), ("up", (p, d)), ("down", (d, p))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": shape.d,
        "intermediate_size": shape.shared,
        "moe_intermediate_size": shape.p,
        "shared_expert_intermediate_size": shape.shared,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": 4,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--like", type=click.Choice(sorted(LIKE)), default="qwen1.5-moe-a2.7b", show_default=True)
@click.option("--layers", type=int, help="Fewer layers than the model has.")
@click.option("--statistics", type=click.Path(path_type=Path), help="Write activation statistics here too.")
@click.option("--zero-down", is_flag=True, help="Every down is zero, for a disk that is short.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(directory: Path, like: str, layers: int | None, statistics: Path | None, seed: int, zero_down: bool) -> None:
    shape = LIKE[like]
    if layers is not None:
        shape = Shape(**{**shape.__dict__, "layers": layers})
    write_synthetic(directory, shape, seed, zero_down=zero_down)
    if statistics is not None:
        write_statistics(directory, statistics, shape, seed)


if __name__ == "__main__":
    main()
