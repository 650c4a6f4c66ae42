"""Dense experts rounded by the libraries that people use, each on the matrices themselves and on the CPU.

    DISABLE_CUDA=1 pip install -c constraints.txt --no-deps hqq termcolor torchao optimum-quanto llmcompressor

A function takes W (rows, columns), the second moment of what W multiplies, or none, and the bits; it hands back what
the library makes of its own codes, and the bytes that it stores: HQQ (Badri & Shaji 2023) and quanto a scale and a real
zero point of 16 bits for every group, torchao's IntxWeightOnlyConfig a scale of 16 bits and with zero points an integer
of 8, llm-compressor's GPTQ what `Bits` counts. Three bits count as 3, though compressed-tensors pads them to 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .grid import Bits

Tensor = torch.Tensor


def hqq(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """Half-quadratic quantisation; groups run through the matrix row by row."""
    from hqq.core.quantize import Quantizer

    settings = {"nbits": bits.bits, "group_size": bits.group, "axis": 1, "round_zero": bits.bits == 4}
    codes, about = Quantizer.quantize(matrix.clone(), device="cpu", compute_dtype=torch.float16, **settings)
    for name in ("scale", "zero"):
        about[name] = about[name].half()
    return Quantizer.dequantize(codes, about).float(), _bytes(matrix, bits.bits, bits.group, 32)


def quanto(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """optimum-quanto's qint2 and qint4 in groups, qint8 with a scale a row."""
    from optimum import quanto as library

    values = matrix.bfloat16()
    if bits.bits == 8:
        scale = library.AbsmaxOptimizer()(values, qtype=library.qint8, axis=0)
        found = library.quantize_weight(values, library.qint8, 0, scale)
        return found.dequantize().float(), matrix.numel() + 2 * len(matrix)
    kinds = {2: library.qint2, 4: library.qint4}
    if bits.bits not in kinds:
        raise ValueError(f"quanto:{bits}: optimum-quanto has 2, 4 and 8 bits")
    chosen: dict[str, Any] = {"qtype": kinds[bits.bits], "axis": 0, "group_size": bits.group}
    scale, shift = library.MaxOptimizer()(values, **chosen)
    found = library.quantize_weight(values, scale=scale, shift=shift, **chosen)
    return found.dequantize().float(), _bytes(matrix, bits.bits, bits.group, 32)


def torchao(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """torchao's IntxWeightOnlyConfig, asymmetric where bits have zero points."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(matrix)
    mapping = MappingType.ASYMMETRIC if bits.zeros else MappingType.SYMMETRIC
    kind = getattr(torch, f"int{bits.bits}")
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(bits.group), mapping_type=mapping))
    stored: Any = layer.weight.data
    return stored.dequantize().float(), _bytes(matrix, bits.bits, bits.group, 24 if bits.zeros else 16)


def llm_compressor(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """llm-compressor's GPTQ, with the scales of its min-max observer."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    if moment is None:
        raise ValueError(f"llm-compressor:{bits}: GPTQ needs activation statistics; ask for @inputs")
    settings: dict[str, Any] = {"num_bits": bits.bits, "strategy": "group", "group_size": bits.group}
    chosen = QuantizationArgs(type="int", symmetric=not bits.zeros, **settings)
    grouped = matrix.unflatten(1, (-1, bits.group))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), chosen)
    scale = scale.half().float()
    hessian = (moment / moment.diagonal().mean()).float()
    found = quantize_weight(matrix.clone()[None], hessian[None], scale[None], zero[None], None, chosen)[0][0]
    return found.float(), bits.bytes(*matrix.shape)


def _bytes(matrix: Tensor, bits: int, group: int, beside: int) -> int:
    """Integers of `bits`, and for every group `beside` bits more."""
    return matrix.numel() * bits // 8 + matrix.numel() // group * beside // 8


LIBRARIES: dict[str, Callable[[Tensor, Tensor | None, Bits], tuple[Tensor, int]]] = {
    "hqq": hqq,
    "quanto": quanto,
    "torchao": torchao,
    "llm-compressor": llm_compressor,
}
