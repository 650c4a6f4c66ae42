"""Which tensors a matrix is stored as, by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.scales import Part
from globe.checkpoint.formats.scheme import REMEDY, Scheme, scheme_of
from globe.checkpoint.quantised import is_quantised, quantization_of
from globe.checkpoint.tensorfile import DTYPE_BITS, TensorInfo, tensor_bytes
from globe.errors import GlobeError

# Of a tensor that holds codes, what its name has beyond that of the matrix.
_PACKED, _BLOCKS = "_packed", "_blocks"
_CODES = {"e4m3": ("F8_E4M3",), "int8": ("I8",), "e2m1": ("U8",), "packed4": ("I32",), "packed8": ("I32",)}
_SCALES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8")
_OF_INPUTS = (".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale")


def plain_name(tensor: str) -> str:
    """A matrix's own name, from that of the tensor that holds its values or codes."""
    for ending in (".weight" + _PACKED, "_proj" + _BLOCKS):
        if tensor.endswith(ending):
            return tensor.removesuffix(_PACKED).removesuffix(_BLOCKS)
    return tensor


def has_outputs_first(tensor: str) -> bool:
    """Whether a stack of codes is [E, outputs, inputs] where the same stack of values is not: mxfp4's blocks."""
    return tensor.endswith(_BLOCKS)


def open_all(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo | Encoded]:
    """All tensors, with what is stored as codes under its own name in place of them: not of experts alone.

    Raises
    ------
    GlobeError
        As `open_encoded`, or if a tensor of another kind than codes and their scales is not of values.
    """
    codes = [name for name, info in tensors.items() if _is_codes(name, info, tensors, config)]
    found = as_decoded(tensors, [open_encoded(name, tensors, config) for name in codes])
    for name, info in found.items():
        if isinstance(info, TensorInfo) and is_quantised(info.dtype):
            found[name] = open_encoded(name, tensors, config)  # which says what is missing
    return found


def _is_codes(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether there are scales for a tensor."""
    return is_quantised(info.dtype) and _scale_name(name, plain_name(name), config) in tensors


def open_encoded(tensor: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Encoded:
    """What a tensor of codes decodes to, from headers alone.

    Parameters
    ----------
    tensor : str
        The one that holds the codes.
    tensors : mapping
        All of the checkpoint.
    config : mapping
        config.json.

    Raises
    ------
    GlobeError
        If its format is not read, or a tensor that it needs is missing or of another shape or dtype.
    """
    name, codes = plain_name(tensor), Part(tensor, tensors[tensor])
    scheme = scheme_of(config, name, codes.info.dtype)
    shape = _shape(codes, scheme)
    scale = _scale_name(tensor, name, config)
    parts = {"codes": codes, "scale": _needed(scale, tensors, tensor)}
    for role in ("zero_point", "global_scale", "shape"):
        if f"{name}_{role}" in tensors:
            parts[role] = Part(f"{name}_{role}", tensors[f"{name}_{role}"])
    if f"{name}_g_idx" in tensors:
        raise GlobeError(
            f"tensor {name}_g_idx says that columns are in an order of their own (actorder); expected none: {REMEDY}"
        )
    if scheme.codes == "e2m1" and scheme.block[1] == 16 and "global_scale" not in parts:
        _needed(f"{name}_global_scale", tensors, tensor)
    module = name.removesuffix(".weight")
    parts |= {end[1:]: Part(told, tensors[told]) for end in _OF_INPUTS if (told := module + end) in tensors}
    found = Encoded(name, scheme, parts, shape, _dtype(parts["scale"]))
    _check_parts(found)
    return found


def recalled(name: str, entry: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Encoded:
    """What `Encoded.as_dict` gave under "encoded" of a manifest's entry, of tensors where they lie now.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the entry is damaged.
    GlobeError
        If the tensors do not fit it.
    """
    told = entry["encoded"]
    parts = {role: Part(part["tensor"], tensors[part["tensor"]]) for role, part in told["parts"].items()}
    codes, (rows, columns) = told["scheme"]["codes"], told["scheme"]["block"]
    if codes not in _CODES or any(type(size) is not int or size < 0 for size in (rows, columns)):
        raise ValueError(f"tensor {name} is stored as {codes!r} in blocks of {rows!r} × {columns!r}")
    turned = bool(entry.get("transposed")) and has_outputs_first(parts["codes"].tensor)
    shape = tuple(entry["shape"])
    shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
    found = Encoded(name, Scheme(codes, (rows, columns)), parts, shape, entry["dtype"], turned)
    if _shape(parts["codes"], found.scheme) != found.shape or entry["dtype"] != _dtype(parts["scale"]):
        raise ValueError(f"tensor {name} is {entry['dtype']} {entry['shape']}")
    _check_parts(found)
    return found


def described(name: str, entry: Mapping[str, Any]) -> Encoded:
    """What stands under "encoded" or "origin" of a manifest's entry: how the source had a matrix, without its bytes.

    Raises
    ------
    KeyError, TypeError, ValueError, GlobeError
        As `recalled`.
    """
    told = entry["encoded"] if "encoded" in entry else entry["origin"]
    infos = {}
    for part in told["parts"].values():
        shape = tuple(part["shape"])
        if part["dtype"] not in DTYPE_BITS or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"tensor {part['tensor']} is {part['dtype']} {list(shape)}")
        infos[part["tensor"]] = TensorInfo(Path(), part["dtype"], shape, 0, tensor_bytes(part["dtype"], shape))
    return recalled(name, {**entry, "encoded": told}, infos)


def as_decoded(tensors: Mapping[str, TensorInfo], matrices: Iterable[Encoded]) -> dict[str, TensorInfo | Encoded]:
    """Tensors of a shard with these matrices under their own names in place of their codes, and no other part."""
    codes = {matrix.parts["codes"].tensor: matrix for matrix in matrices}
    parts = {part.tensor for matrix in codes.values() for part in matrix.parts.values()}
    found: dict[str, TensorInfo | Encoded] = {}
    for tensor, info in tensors.items():
        if tensor in codes:
            found[codes[tensor].name] = codes[tensor]
        elif tensor not in parts:
            found[tensor] = info
    return found


def _dtype(scale: Part) -> str:
    return "F16" if scale.info.dtype == "F16" else "BF16"


def _scale_name(tensor: str, name: str, config: Mapping[str, Any]) -> str:
    if tensor.endswith(_BLOCKS):
        return f"{name}_scales"
    quantization = quantization_of(config)
    fine = isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"
    return f"{name}_scale_inv" if fine else f"{name}_scale"


def _needed(name: str, tensors: Mapping[str, TensorInfo], codes: str) -> Part:
    if name not in tensors:
        raise GlobeError(
            f"tensor {name} is missing, without which {codes} cannot be decoded; fetch the checkpoint again"
        )
    return Part(name, tensors[name])


def _shape(codes: Part, scheme: Scheme) -> tuple[int, ...]:
    """What codes decode to."""
    stored, expected = codes.info.shape, _CODES[scheme.codes]
    if codes.info.dtype not in expected:
        raise GlobeError(
            f"tensor {codes.tensor} has dtype {codes.info.dtype}, config.json says {scheme.text}; expected "
            f"{' or '.join(expected)}: {REMEDY}"
        )
    if codes.tensor.endswith(_BLOCKS):
        if len(stored) != 4 or 2 * stored[3] != scheme.block[1]:
            raise _odd(codes, f"[experts, rows, groups, {scheme.block[1] // 2}]")
        return (*stored[:2], stored[2] * stored[3] * 2)
    if len(stored) not in (2, 3):
        raise _odd(codes, "2 or 3 axes")
    each = {"e2m1": 2, "packed4": 8, "packed8": 4}.get(scheme.codes, 1)
    return (*stored[:-1], stored[-1] * each)


def _check_parts(matrix: Encoded) -> None:
    """Check what shapes and dtypes of its parts can show."""
    lead, grid = matrix.shape[:-2], matrix.grid
    scale, scheme = matrix.parts["scale"], matrix.scheme
    _require_grid(scale, lead, grid, matrix)
    mixed = scheme.codes == "e2m1" and scheme.block == (1, 32)
    expected = ("U8", "F8_E8M0") if mixed else ("F8_E4M3",) if "global_scale" in matrix.parts else _SCALES
    if scale.info.dtype not in expected:
        raise GlobeError(
            f"tensor {scale.tensor} has dtype {scale.info.dtype}; expected {' or '.join(expected)}: {REMEDY}"
        )
    overall = matrix.parts.get("global_scale")
    if overall is not None:
        _require_grid(overall, lead, (1, 1), matrix)
        if overall.info.dtype != "F32":
            raise GlobeError(f"tensor {overall.tensor} has dtype {overall.info.dtype}; expected F32: {REMEDY}")
    zero = matrix.parts.get("zero_point")
    if zero is not None and zero.info.dtype == "I32" and scheme.codes.startswith("packed"):
        each = 8 if scheme.codes == "packed4" else 4
        _require_shape(zero, (*lead, -(-grid[0] // each), grid[1]), matrix)
    elif zero is not None:
        _require_grid(zero, lead, grid, matrix)
        if zero.info.dtype != "I8":
            raise GlobeError(f"tensor {zero.tensor} has dtype {zero.info.dtype}; expected I8 or I32: {REMEDY}")
    stated = matrix.parts.get("shape")
    if stated is not None:
        _require_shape(stated, (*lead, 2), matrix)
        if stated.info.dtype not in ("I64", "I32"):
            raise GlobeError(f"tensor {stated.tensor} has dtype {stated.info.dtype}; expected I64: {REMEDY}")


def _require_grid(part: Part, lead: tuple[int, ...], grid: tuple[int, int], matrix: Encoded) -> None:
    """A scale for each block: [rows, columns], [rows] where a row has one, and where the matrix has one just that."""
    allowed = [(*lead, *grid)]
    allowed += [(*lead, grid[0])] if grid[1] == 1 else []
    allowed += [lead, (*lead, 1)] if grid == (1, 1) else []
    if part.info.shape not in allowed:
        _require_shape(part, allowed[0], matrix)


def _require_shape(part: Part, expected: tuple[int, ...], matrix: Encoded) -> None:
    if part.info.shape != expected:
        codes = matrix.parts["codes"]
        raise _odd(part, f"{list(expected)} for {codes.tensor} {list(codes.info.shape)} in {matrix.scheme.text}")


def _odd(part: Part, expected: str) -> GlobeError:
    return GlobeError(
        f"tensor {part.tensor} has shape {list(part.info.shape)}; expected {expected}: fetch the checkpoint again, "
        f"or {REMEDY}"
    )
