"""Matrices stored as codes with scales: made by compressed-tensors' own library, or here by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_TOP = {"e4m3": 448.0, 4: 7.0, 8: 127.0}


def fp8(weight: torch.Tensor, block: tuple[int, int], kind: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in blocks, of any size at the edges; of kind e8m0 exponents of powers of two, as bytes."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = weight[place].float().abs().max() / _TOP["e4m3"]
            scale = 2.0 ** scale.log2().ceil() if kind == "e8m0" else scale.to(getattr(torch, kind)).float()
            scales[i, j] = scale
            codes[place] = (weight[place].float() / scale).to(torch.float8_e4m3fn)
    exponents = (scales.log2() + 127).to(torch.uint8)
    return codes, exponents if kind == "e8m0" else scales.to(getattr(torch, kind))


def fp8_checkpoint(directory: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """Give the experts of a checkpoint of one file codes and scales in the place of their weights."""
    file, stored = directory / "model.safetensors", Tensors()
    for name, value in load_file(file).items():
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"] = fp8(value, block)
        else:
            stored[name] = value
    save_file(stored, file, metadata={"format": "pt"})
    told = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    told["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    (directory / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return directory


def compressed(weight: torch.Tensor, form: str, weights: dict[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """A matrix as compressed-tensors stores it (`weight_packed`, …), and what its library makes of that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)
    library = BaseCompressor.get_value_from_registry(form)
    given = {"weight": weight, **_scales(weight, weights)}
    stored = library.compress(given, scheme)
    return stored, library.decompress(stored, scheme)["weight"]


def config(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The `quantization_config` of such matrices."""
    group = {"targets": ["Linear"], "weights": weights}
    stated = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**stated, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


def _scales(weight: torch.Tensor, weights: dict[str, Any]) -> Tensors:
    """Scales (and zero points) of rows, groups, blocks or the whole, in the weight's dtype."""
    top = 6.0 if weights["num_bits"] == 4 and weights["type"] == "float" else _TOP.get(weights["num_bits"], 0.0)
    top = _TOP["e4m3"] if weights["num_bits"] == 8 and weights["type"] == "float" else top
    p, d = weight.shape
    rows, columns = {
        "tensor": (p, d),
        "channel": (1, d),
        "block": weights.get("block_structure"),
    }.get(weights["strategy"], (1, weights.get("group_size")))
    blocks = weight.float().view(p // rows, rows, d // columns, columns)
    scale = blocks.abs().amax((1, 3)) / top
    if weights["strategy"] == "tensor_group":
        overall = torch.tensor([448.0 * 6 / float(weight.float().abs().max())])
        return {"weight_scale": (scale * overall).to(torch.float8_e4m3fn).float(), "weight_global_scale": overall}
    if top == 6.0:
        return {"weight_scale": (2.0 ** scale.log2().ceil()).to(weight.dtype)}
    scale = scale.view(1) if weights["strategy"] == "tensor" else scale
    if weights.get("symmetric", True):
        return {"weight_scale": scale.to(weight.dtype)}
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scale = ((high - low) / (2 * top + 1)).to(weight.dtype)
    zero = (-top - 1 - low / scale.float()).round().clamp(-top - 1, top).to(torch.int8)
    return {"weight_scale": scale, "weight_zero_point": zero}
