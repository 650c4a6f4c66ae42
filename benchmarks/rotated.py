"""The same function in other weights: a checkpoint with its residual stream rotated, so that its source's grid is gone.

    python -m benchmarks.rotated MODEL OUT [--seed 7] [--calibration FILE]

Weights that were once rounded lie on a grid, and rounding them again in the same groups costs nothing: a comparison
with quantisation on them says nothing. Here the norms' scales go into what reads the normalised stream, and a random
orthogonal matrix Q goes into all that writes the stream and into all that reads it:

    embeddings E ← E Qᵀ,   readers W ← W diag(g) Qᵀ,   writers W ← Q W,   g ← 1.

A norm without scales commutes with Q (Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.1), so the logits
stay what they were up to the rounding of the weights. The head, which reads behind a norm of its own, is untied.
--calibration turns statistics of MODEL along, to OUT.safetensors: what they are of is the same function.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import click
import torch

from globe.checkpoint.companions import copy_companions
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.shards import INDEX_NAME
from globe.checkpoint.tensorfile import TORCH_DTYPES, TensorInfo, TensorWriter, copy_chunks, read_tensor, write_text
from globe.errors import GlobeError
from globe.statistics.calibration import TOKENS, load_calibration, save_calibration

MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

_OWN = ("own_directions", "own_values", "own_sizes")
_LAYER = r"model\.layers\.\d+\."
_NORM = re.compile(rf"{_LAYER}(input|post_attention)_layernorm\.weight|model\.norm\.weight")
_READERS = {
    "input_layernorm": re.compile(rf"{_LAYER}self_attn\.[qkv]_proj\.weight"),
    "post_attention_layernorm": re.compile(
        rf"{_LAYER}(mlp|block_sparse_moe)\."
        r"(gate|shared_expert_gate|(experts\.\d+\.|shared_expert\.)?(gate_proj|up_proj|w1|w3))\.weight"
    ),
}
_WRITERS = re.compile(rf"{_LAYER}(self_attn\.o_proj|(mlp|block_sparse_moe)\..*(down_proj|w2))\.weight")
_UNTOUCHED = re.compile(rf"{_LAYER}self_attn\.([qkv]_proj\.bias|[qk]_norm\.weight)")  # behind a reader


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=7, show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Statistics of MODEL, written to OUT.safetensors.")
def main(model: Path, out: Path, seed: int, calibration: Path | None) -> None:
    """Write MODEL with its residual stream rotated to OUT."""
    try:
        rotate(model, out, seed)
        if calibration is not None:
            turn(calibration, model, out, seed)
    except GlobeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: written")


def rotate(model: Path, out: Path, seed: int = 7) -> None:
    """Write a checkpoint of the same function, names and dtypes; a head that was tied is a tensor of its own.

    Raises
    ------
    GlobeError
        If the architecture is not one of `MODEL_TYPES`, a tensor is not known, or `out` is there already.
    """
    checkpoint = Checkpoint(model)
    kind = checkpoint.config.get("model_type")
    if kind not in MODEL_TYPES:
        raise GlobeError(f"{model}: model type {kind} found; expected one of {', '.join(MODEL_TYPES)}")
    if out.exists():
        raise GlobeError(f"{out}: exists; name a directory that does not")
    stream = Stream(checkpoint, seed)
    for name in checkpoint.tensors:
        stream.require_known(name)
    out.mkdir(parents=True)
    tied = checkpoint.tensors[EMBEDDING] if HEAD not in checkpoint.tensors else None
    weight_map = {}
    for shard in checkpoint.shards:
        entries = {name: (info.dtype, info.shape) for name, info in shard.tensors.items()}
        entries |= {HEAD: (tied.dtype, tied.shape)} if tied is not None and shard is checkpoint.shards[-1] else {}
        weight_map |= dict.fromkeys(entries, shard.path.name)
        with TensorWriter(out / shard.path.name, entries, {"format": "pt"}) as writer:
            for name in entries:
                info = tied if tied is not None and name == HEAD else checkpoint.tensors[name]
                if _UNTOUCHED.fullmatch(name):
                    writer.write_chunks(name, copy_chunks(info))
                else:
                    writer.write(name, stream.rotated(name, info))
    copy_companions(checkpoint.directory, out)
    if checkpoint.index is not None:
        told = {"metadata": {"total_size": sum(path.stat().st_size for path in out.glob("*.safetensors"))}}
        write_text(out / INDEX_NAME, json.dumps(told | {"weight_map": weight_map}, indent=1))
    write_text(out / "config.json", json.dumps(checkpoint.config | {"tie_word_embeddings": False}, indent=2))


def turn(calibration: Path, model: Path, out: Path, seed: int = 7) -> Path:
    """Statistics of `model` as those of `out`, its rotation.

    M ← Q diag(g)⁻¹ M diag(g)⁻¹ Qᵀ; F ← Q F Qᵀ of the Fisher information of a layer's output; all else stays.

    Raises
    ------
    GlobeError
        If experts have inputs of their own: of those the diagonal alone is known, and says nothing when rotated.
    """
    found, stream = load_calibration(calibration), Stream(Checkpoint(model), seed)
    layers = {}
    for number in found.layers:
        layer = found.layer(number)
        own = layer.own_values is not None and bool(layer.own_values.any())
        if own or not torch.equal(layer.diagonal, layer.moment.diagonal().expand_as(layer.diagonal)):
            raise GlobeError(
                f"calibration {calibration}: experts of layer {number} have inputs of their own: calibrate OUT"
            )
        scales = stream.scales(f"model.layers.{number}.post_attention_layernorm.weight")
        moment = _turned(layer.moment, stream.rotation / scales)
        output = None if layer.output_fisher is None else _turned(layer.output_fisher, stream.rotation)
        diagonal = moment.diagonal().expand_as(layer.diagonal).clone()
        layers[number] = replace(layer, moment=moment, output_fisher=output, diagonal=diagonal, **dict.fromkeys(_OWN))
    tokens = {name: ids for name in TOKENS if (ids := found.tokens(name)) is not None}
    about = found.about | {"fingerprint": Checkpoint(out).fingerprint()}
    return save_calibration(out.with_name(f"{out.name}.safetensors"), layers, about, tokens).path


def _turned(moment: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    turned = by @ moment.double() @ by.mT
    return ((turned + turned.mT) / 2).float()


class Stream:
    """The rotation of a checkpoint's residual stream, and the norms before what reads it."""

    def __init__(self, checkpoint: Checkpoint, seed: int) -> None:
        self.checkpoint = checkpoint
        width = checkpoint.tensors[EMBEDDING].shape[1]
        generator = torch.Generator().manual_seed(seed)
        made = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        self.rotation = made.Q * made.R.diagonal().sign()  # uniform over all rotations (Mezzadri 2007)

    def require_known(self, name: str) -> None:
        """Refuse a tensor of which it is not known whether it reads or writes the stream."""
        patterns = (_NORM, *_READERS.values(), _WRITERS, _UNTOUCHED)
        if name not in (EMBEDDING, HEAD) and not any(pattern.fullmatch(name) for pattern in patterns):
            raise GlobeError(f"{self.checkpoint.directory}: tensor {name} is not known to read or to write the stream")

    def rotated(self, name: str, info: TensorInfo) -> torch.Tensor:
        """A tensor in the rotated stream, rounded once to its dtype."""
        found = read_tensor(info).double()
        if _NORM.fullmatch(name):
            found = torch.ones_like(found)
        elif name == EMBEDDING:
            found = found @ self.rotation.mT
        elif _WRITERS.fullmatch(name):
            found = self.rotation @ found
        else:
            found = (found * self.scales(self._norm_before(name))) @ self.rotation.mT
        return found.to(TORCH_DTYPES[info.dtype])

    def scales(self, norm: str) -> torch.Tensor:
        """g of a norm."""
        return read_tensor(self.checkpoint.tensors[norm]).double()

    @staticmethod
    def _norm_before(name: str) -> str:
        for kind, pattern in _READERS.items():
            if pattern.fullmatch(name):
                return f"model.layers.{name.split('.')[2]}.{kind}.weight"
        return NORM


if __name__ == "__main__":
    main()
