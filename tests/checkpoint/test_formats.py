"""Codes with scales decode to the bit as transformers and compressed-tensors decode them; hostile ones are refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

import codes  # noqa: E402
from codes import Tensors  # noqa: E402
from globe.artifact.as_source import requantised  # noqa: E402
from globe.checkpoint.family import Expert  # noqa: E402
from globe.checkpoint.formats.encoded import Encoded, stored_as  # noqa: E402
from globe.checkpoint.formats.tensors import open_encoded, plain_name  # noqa: E402
from globe.checkpoint.tensorfile import read_header  # noqa: E402
from globe.errors import GlobeError  # noqa: E402

MODULE = "model.layers.0.mlp.experts.0.gate_proj"
NAME = f"{MODULE}.weight"
P, D = 48, 128


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(P, D, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)


def opened(folder: Path, tensors: Tensors, quantization: Any) -> Encoded:
    """The matrix that tensors decode to, by way of a file."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    found = read_header(folder / "model.safetensors").tensors
    anchor = next(name for name in found if plain_name(name) in (NAME, "model.layers.0.mlp.experts.gate_up_proj"))
    return open_encoded(anchor, found, {"quantization_config": quantization})


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int16), expected.view(torch.int16))


def fp8_config(block: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": block}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("block", [(16, 32), (48, 128), (1, 64)])
def test_fp8_blocks_as_transformers(tmp_path: Path, kind: str, block: tuple[int, int]) -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    stored, scales = codes.fp8(weights(), block, "e8m0" if kind in ("float8_e8m0fnu", "uint8") else kind)
    if kind == "float8_e8m0fnu":
        if not hasattr(torch, kind):
            pytest.skip("torch has had the type since 2.7")
        scales = scales.view(torch.float8_e8m0fnu)
    expected = integration.Fp8Dequantize(None)._dequantize_one(stored, scales, torch.bfloat16)
    found = opened(tmp_path, {NAME: stored, f"{NAME}_scale_inv": scales}, fp8_config(block))
    assert found.shape == (P, D) and stored_as(found).startswith("e4m3")
    assert same_bits(found.read(), expected)
    assert same_bits(found.read((17, 35)), expected[17:35])


def test_fp8_blocks_that_do_not_end_with_the_matrix(tmp_path: Path) -> None:
    weight = weights()[:43, :101]
    stored, scales = codes.fp8(weight, (16, 32))
    wide = scales.repeat_interleave(16, 0).repeat_interleave(32, 1)[:43, :101]
    expected = (stored.float() * wide).bfloat16()
    found = opened(tmp_path, {NAME: stored, f"{NAME}_scale_inv": scales}, fp8_config([16, 32]))
    assert same_bits(found.read(), expected) and same_bits(found.read((15, 33)), expected[15:33])
    assert float((found.read().float() - weight.float()).abs().max()) < 0.07 * float(weight.abs().max())


def test_fp8_with_one_scale(tmp_path: Path) -> None:
    stored, scales = codes.fp8(weights(), (P, D))
    found = opened(tmp_path, {NAME: stored, f"{NAME}_scale_inv": scales.view(())}, fp8_config(None))
    assert (
        same_bits(found.read(), (stored.float() * scales).bfloat16()) and stored_as(found) == "e4m3, a scale a matrix"
    )


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 a row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 a matrix": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "int8 a row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4 groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 a row": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int4 a matrix": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "tensor"}),
    "int4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8 groups": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}),
    "int8 with zero points": (
        "pack-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compressed_tensors_as_its_library(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    stored, expected = codes.compressed(weights(dtype), *FORMS[form])
    found = opened(tmp_path, {f"{MODULE}.{name}": value for name, value in stored.items()}, codes.config(*FORMS[form]))
    scale = stored["weight_scale"].dtype
    expected = expected.to(torch.float16 if scale == torch.float16 else torch.bfloat16)
    assert found.name == NAME and found.shape == (P, D) and found.grid[0] in (1, 3, P)
    assert same_bits(found.read(), expected) and same_bits(found.read((5, 31)), expected[5:31])
    assert float((expected.float() - weights().float()).abs().max()) < 0.2 * float(weights().abs().max())
    assert found.nbytes == sum(value.nbytes for value in stored.values())


def mxfp4(experts: int = 3, rows: int = 8, groups: int = 4) -> Tensors:
    """gpt-oss's tensors: rows alternate between gate and up."""
    draw = torch.Generator().manual_seed(2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return {
        f"{name}_blocks": torch.randint(0, 256, (experts, rows, groups, 16), generator=draw, dtype=torch.uint8),
        f"{name}_scales": torch.randint(90, 140, (experts, rows, groups), generator=draw, dtype=torch.uint8),
    }


def test_mxfp4_as_transformers(tmp_path: Path) -> None:
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = mxfp4()
    expected = integration.convert_moe_packed_tensors(*tensors.values()).transpose(1, 2).contiguous()
    found = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert found.shape == (3, 8, 128) and stored_as(found) == "e2m1, groups of 32"
    assert same_bits(found.read(), expected)
    assert same_bits(found.read((2, 5), 1), expected[1, 2:5])


def test_experts_of_a_stack_and_transposed_ones(tmp_path: Path) -> None:
    tensors = mxfp4()
    found = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    whole = found.read()
    up = Expert(0, 2, found.name, found, 2, 4, "up", both=True)
    assert up.matrix == (4, 128) and same_bits(up.read((1, 3)), whole[2, 5:7])
    down = Expert(0, 2, found.name, found, 2, 0, "down")
    assert down.matrix == (128, 8) and same_bits(down.read((10, 90)), whole[2].T[10:90].contiguous())
    out = torch.empty(128, 8, dtype=torch.bfloat16)
    assert down.read((0, 128), out) is out and same_bits(out, whole[2].T.contiguous())
    assert up.stored_bytes * 2 == down.stored_bytes == sum(value.nbytes for value in tensors.values()) // 3
    assert up.counted == up.stored_bytes / 2


@pytest.mark.parametrize("family", ["gate", "down"])
def test_decoding_takes_at_most_four_copies_of_an_expert(tmp_path: Path, family: str) -> None:
    rows, columns = 2048, 7168
    stored = torch.full((rows, columns), 60, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {NAME: stored, f"{NAME}_scale_inv": torch.full((16, 56), 0.5)}
    expert = Expert(0, 0, NAME, opened(tmp_path, tensors, fp8_config([128, 128])), None, 0, family)
    shape = expert.matrix
    expert.read((0, 1))
    tracemalloc.start()  # NumPy and Python; torch's result comes on top
    decoded = expert.read((0, shape[0]))
    peak = tracemalloc.get_traced_memory()[1] + decoded.nbytes
    tracemalloc.stop()
    assert tuple(decoded.shape) == shape and bool((decoded == float(stored[0, 0]) / 2).all())
    assert peak <= 4 * stored.nbytes


def edited(name: str, place: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8 if tensors[name].itemsize == 1 else tensors[name].dtype)[place] = value

    return change


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        value = tensors.pop(name)
        if make is not None:
            tensors[name] = make(value)

    return change


INV, PACKED, SCALE = f"{NAME}_scale_inv", f"{NAME}_packed", f"{NAME}_scale"
MX = "model.layers.0.mlp.experts.gate_up_proj"
HOSTILE: dict[str, tuple[str, Callable[[Tensors], None], tuple[str, ...]]] = {
    "NaN": ("fp8", edited(INV, (1, 2), float("nan")), (INV, "holds nan in row 1, column 2", "expected scales above 0")),
    "zero": ("fp8", edited(INV, (2, 0), 0.0), (INV, "holds 0 in row 2, column 0")),
    "negative zero": ("fp8", edited(INV, (2, 0), -0.0), (INV, "holds -0 in row 2")),
    "negative": ("fp8", edited(INV, (2, 0), -1.0), (INV, "holds -1 in row 2")),
    "infinite": ("fp8", edited(INV, (0, 3), float("inf")), (INV, "holds inf in row 0, column 3")),
    "too large": ("fp8", edited(INV, (0, 3), 1e37), (INV, "codes up to 448 stay within BF16")),
    "no scale": ("fp8", replaced(INV, None), (f"{INV} is missing", "fetch the checkpoint again")),
    "scale of another shape": (
        "fp8",
        replaced(INV, lambda scale: scale[:2].clone()),
        (INV, "has shape [2, 4]", "expected [3, 4]", "blocks of 16 × 32", "start from"),
    ),
    "scale of another dtype": ("fp8", replaced(INV, lambda scale: scale.long()), (INV, "I64", "expected F32")),
    "e8m0 NaN": ("e8m0", edited(INV, (0, 1), 255), (INV, "e8m0 exponent 255", "row 0, column 1")),
    "e8m0 too large": ("e8m0", edited(INV, (0, 1), 250), (INV, "e8m0 exponent 250", "stay within BF16")),
    "mxfp4 NaN": ("mxfp4", edited(f"{MX}_scales", (1, 2, 3), 255), (f"{MX}_scales", "e8m0 exponent 255")),
    "mxfp4 too large": ("mxfp4", edited(f"{MX}_scales", (1, 2, 3), 253), (f"{MX}_scales", "e8m0 exponent 253")),
    "mxfp4 blocks of another size": (
        "mxfp4",
        replaced(f"{MX}_blocks", lambda blocks: blocks[..., :8].clone()),
        (f"{MX}_blocks", "[3, 8, 4, 8]", "[experts, rows, groups, 16]"),
    ),
    "packed codes cut": (
        "int4",
        replaced(PACKED, lambda packed: packed[:, :8].clone()),
        (f"{SCALE} has shape [48, 4]", "expected [48, 2]", f"{PACKED} [48, 8]"),
    ),
    "another stored shape": (
        "int4",
        replaced(f"{NAME}_shape", lambda shape: torch.tensor([48, 120])),
        (f"{NAME}_shape holds [48, 120]", "codes for [48, 128]"),
    ),
    "an order of columns": (
        "int4",
        lambda tensors: tensors.update({f"{NAME}_g_idx": torch.zeros(D, dtype=torch.int32)}),
        (f"{NAME}_g_idx", "actorder", "start from"),
    ),
    "another dtype of codes": (
        "int4",
        replaced(PACKED, lambda packed: packed.long()),
        (PACKED, "has dtype I64", "expected I32"),
    ),
    "negative zero in nvfp4": (
        "nvfp4",
        edited(SCALE, (3, 1), 0x80),
        (SCALE, "holds -0 in row 3, column 1", "expected scales above 0"),
    ),
    "NaN overall": ("nvfp4", edited(f"{NAME}_global_scale", (0,), float("nan")), (f"{NAME}_global_scale", "holds nan")),
    "no overall scale": ("nvfp4", replaced(f"{NAME}_global_scale", None), (f"{NAME}_global_scale is missing",)),
}


def sound(kind: str) -> tuple[Tensors, dict[str, Any]]:
    if kind == "mxfp4":
        return mxfp4(), {"quant_method": "mxfp4"}
    if kind in ("fp8", "e8m0"):
        stored, scales = codes.fp8(weights(), (16, 32), "float32" if kind == "fp8" else "e8m0")
        return {NAME: stored, INV: scales}, fp8_config([16, 32])
    pytest.importorskip("compressed_tensors")
    form = FORMS["int4 groups" if kind == "int4" else kind]
    stored = codes.compressed(weights(), *form)[0]
    return {f"{MODULE}.{name}": value for name, value in stored.items()}, codes.config(*form)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_parts_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    kind, change, expected = HOSTILE[case]
    tensors, quantization = sound(kind)
    assert bool(opened(tmp_path, tensors, quantization).read().isfinite().all())
    change(tensors)
    with pytest.raises(GlobeError) as caught:
        opened(tmp_path, tensors, quantization).read()
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in expected), line


def test_a_group_of_zeros_of_nvfp4_is_zeros(tmp_path: Path) -> None:
    tensors, quantization = sound("nvfp4")
    edited(SCALE, (3, 1), 0)(tensors)
    assert not opened(tmp_path, tensors, quantization).read()[3, 16:32].any()


def test_codes_that_are_not_a_number_come_out_so(tmp_path: Path) -> None:
    tensors, quantization = sound("fp8")
    edited(NAME, (7, 9), 0xFF)(tensors)
    found = opened(tmp_path, tensors, quantization).read()
    assert np.argwhere(found.isnan().numpy()).tolist() == [[7, 9]]


INT4 = FORMS["int4 groups"]
STATED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "nothing": ("fp8", None, ("F8_E4M3", "no quantization_config that says how", "start from")),
    "another method": (
        "fp8",
        {"quant_method": "bitsandbytes"},
        ("'bitsandbytes'", "expected fp8, mxfp4", "start from"),
    ),
    "block of zero": ("fp8", fp8_config([0, 32]), ("weight_block_size is [0, 32]", "two positive integers")),
    "block of a word": ("fp8", fp8_config("128"), ("weight_block_size is '128'", "two positive integers")),
    "block of floats": ("fp8", fp8_config([16.0, 32.0]), ("weight_block_size is [16.0, 32.0]",)),
    "block of one": ("fp8", fp8_config([128]), ("weight_block_size is [128]",)),
    "another format": ("int4", codes.config("marlin-24", INT4[1]), ("format is 'marlin-24'", "pack-quantized")),
    "no groups": ("int4", {"quant_method": "compressed-tensors"}, ("config_groups is None",)),
    "groups of others": (
        "int4",
        {**codes.config(*INT4), "config_groups": {"a": {"targets": ["re:.*attn.*"], "weights": INT4[1]}}},
        ("config_groups is no group", MODULE),
    ),
    "three bits": ("int4", codes.config(INT4[0], {**INT4[1], "num_bits": 3}), ("int of 3 bits", "4 or 8 bits")),
    "a group of none": ("int4", codes.config(INT4[0], {**INT4[1], "group_size": 0}), ("group_size is 0",)),
    "another strategy": ("int4", codes.config(INT4[0], {**INT4[1], "strategy": "token"}), ("strategy is 'token'",)),
    "a pattern that is none": (
        "int4",
        {**codes.config(*INT4), "config_groups": {"a": {"targets": ["re:("], "weights": INT4[1]}}},
        ("targets is 're:('", "regular expression"),
    ),
}


@pytest.mark.parametrize("case", STATED)
def test_what_config_json_cannot_say_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    kind, quantization, expected = STATED[case]
    with pytest.raises(GlobeError) as caught:
        opened(tmp_path, sound(kind)[0], quantization)
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in expected), line


def test_experts_may_have_a_group_of_their_own(tmp_path: Path) -> None:
    tensors, _ = sound("int4")
    groups = {
        "group_0": {"targets": ["Linear"], "weights": FORMS["fp8 a row"][1], "format": "float-quantized"},
        "group_1": {"targets": [r"re:.*\.experts\..*"], "weights": INT4[1], "format": "pack-quantized"},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    assert stored_as(opened(tmp_path, tensors, quantization)) == "int4, groups of 32"


def test_scales_that_fp16_would_round_to_zero_stay_above_it(tmp_path: Path) -> None:
    tiny = torch.full((P, D), 2.0**-20)
    stored, scales = codes.fp8(weights(), (16, 32))
    tensors = {NAME: stored, f"{NAME}_scale_inv": scales.half()}
    matrix = opened(tmp_path, tensors, fp8_config([16, 32]))
    made, theirs = requantised(matrix, tiny)
    again = opened(tmp_path, {NAME: made, f"{NAME}_scale_inv": theirs}, fp8_config([16, 32])).read()
    assert theirs.dtype == torch.float16 and torch.equal(again.float(), tiny)
