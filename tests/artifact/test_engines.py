"""Exports in other engines: mlx-lm loads them, and GGUF's tensor maps know every name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402

# transformers' model type → architecture in GGUF
GGUF = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "glm4_moe": "glm4moe",
    "mixtral": "llama",
    "phimoe": "phimoe",
    "minimax_m2": "minimax-m2",
    "granitemoe": "granitemoe",
}
MLX = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "granitemoe")
SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", calibrate="none")
SUFFIXES = (".weight", ".bias")


def dense(layout: str, home: Path, dtype: str = "bfloat16") -> tuple[Path, Path]:
    """A tiny source and its export; config.json has the keys of published checkpoints."""
    source = make_tiny(layout, home / "source", dtype=dtype, shards=2)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    if layout == "qwen3_moe":
        config.setdefault("num_experts", config["num_local_experts"])
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compress(source, home / "out", SETTINGS)
    export(home / "out", home / "dense")
    return source, home / "dense"


def shapes(directory: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """File, shape and type of every tensor."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stored = tensors.get_slice(name)
                found[name] = (file.name, tuple(stored.get_shape()), stored.get_dtype())
    return found


def merged(names: set[str], experts: int) -> set[str]:
    """Names after convert_hf_to_gguf.py has stacked the experts of a layer; none may be missing."""
    numbers: dict[str, set[int]] = defaultdict(set)
    kept = set()
    for name in names:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if match is None:
            kept.add(name)
        else:
            numbers[f"{match[1]}.{match[3]}"].add(int(match[2]))
    assert all(found == set(range(experts)) for found in numbers.values())
    return kept | set(numbers)


@pytest.mark.parametrize("layout", sorted(GGUF))
def test_names_shapes_and_shards_are_those_that_gguf_knows(layout: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, target = dense(layout, tmp_path)
    found, index = shapes(target), json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert found == shapes(source)
    assert index["weight_map"] == {name: file for name, (file, _, _) in found.items()}
    config = Checkpoint(target).config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == GGUF[layout])
    known = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    experts = next(config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config)
    for name in merged(set(found), experts):
        # the converter splits or renames these two itself before it asks the map
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        if name.endswith((".block_sparse_moe.input_linear.weight", ".shared_mlp.input_linear.weight")):
            continue
        if layout == "qwen3_moe" and name.startswith("model.layers.1.mlp."):
            continue  # a dense layer, which no published Qwen3-MoE has
        assert known.get_name(name, SUFFIXES) is not None, name


@pytest.mark.parametrize("layout", MLX)
def test_mlx_loads_it_and_agrees(layout: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    _, target = dense(layout, tmp_path, "float32")
    model, _ = mlx_utils.load_model(target, strict=True)  # every name and shape as mlx-lm's sanitize leaves them
    ids = list(b"A router chooses")
    ours = torch.tensor(model(mx.array([ids])).astype(mx.float32).tolist())
    theirs, _ = load_model(target)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.float()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
