"""Matrices packed as compressed-tensors' pack-quantized has them: integers in words of 32 bits, a scale for each group.

Of a tensor `name` (…, rows, columns) there are `name_packed` (int32), `name_scale` (bf16) and `name_shape` (int64: rows
and columns). An integer q of b bits is stored as q + 2^(b−1); those of a row follow each other from the lowest bit of
its first word on, without a gap, so that some of 3 bits lie across two words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from globe.checkpoint.tensorfile import TensorInfo, read_tensor
from globe.errors import GlobeError

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
PACKED_BITS = (8, 4, 3)


@dataclass(frozen=True)
class Packing:
    """Bits b of an integer, and how many of a row share a scale."""

    bits: int
    group: int

    def words(self, columns: int) -> int:
        """Words of 32 bits that a row takes."""
        return -(-columns * self.bits // 32)

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, dtypes and shapes of what a tensor is stored as."""
        *lead, columns = shape
        return {
            name + PACKED: ("I32", (*lead, self.words(columns))),
            name + SCALE: ("BF16", (*lead, columns // self.group)),
            name + SHAPE: ("I64", (*lead[:-1], 2)),
        }

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all of these."""
        *lead, columns = shape
        return math.prod(lead) * (4 * self.words(columns) + 2 * (columns // self.group)) + 16 * math.prod(lead[:-1])

    def as_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"bits": self.bits, "group": self.group}


def read_packing(told: object, columns: int) -> Packing | None:
    """What a manifest says of how a tensor with rows of so many columns is packed; None where it says nothing.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    if told is None:
        return None
    if isinstance(told, Mapping) and set(told) == {"bits", "group"}:
        bits, group = told["bits"], told["group"]
        if type(bits) is int and bits in PACKED_BITS and type(group) is int and group > 0 and columns % group == 0:
            return Packing(bits, group)
    raise ValueError(f"rows of {columns} are packed as {told!r}")


def packed(name: str, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The stored tensors of integers (…, rows, columns; int8) and scales (…, rows, groups)."""
    sizes = torch.tensor(codes.shape[-2:], dtype=torch.int64)
    return {
        name + PACKED: pack(codes, bits),
        name + SCALE: scales.bfloat16(),
        name + SHAPE: sizes.expand(*codes.shape[:-2], 2).contiguous(),
    }


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (…, columns; int8, from −2^(b−1) to 2^(b−1) − 1) in words (…, ⌈columns b / 32⌉; int32)."""
    size, count = _cell(bits)
    columns, words = codes.shape[-1], -(-codes.shape[-1] * bits // 32)
    cells = torch.nn.functional.pad(codes.to(torch.int32) + (1 << bits - 1), (0, -columns % count))
    places = torch.arange(count, dtype=torch.int32, device=codes.device)
    joined = (cells.unflatten(-1, (-1, count)) << places * bits).sum(-1, dtype=torch.int32)
    octets = (joined[..., None] >> 8 * torch.arange(size, dtype=torch.int32, device=codes.device)) & 255
    whole = octets.to(torch.uint8).flatten(-2)[..., : 4 * words]
    return torch.nn.functional.pad(whole, (0, 4 * words - whole.shape[-1])).contiguous().view(torch.int32)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The integers (…, columns; int8) of words (…, ⌈columns b / 32⌉; int32), where the words are."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets[..., :columns] ^ 128).view(torch.int8)
    if bits == 4:
        return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)[..., :columns].view(torch.int8) - 8
    size, count = _cell(bits)
    cells = -(-columns // count)
    octets = torch.nn.functional.pad(octets, (0, max(0, cells * size - octets.shape[-1])))[..., : cells * size]
    places = torch.arange(size, dtype=torch.int32, device=words.device)
    joined = (octets.unflatten(-1, (-1, size)).to(torch.int32) << 8 * places).sum(-1, dtype=torch.int32)
    places = torch.arange(count, dtype=torch.int32, device=words.device)
    values = (joined[..., None] >> places * bits) & ((1 << bits) - 1)
    found: torch.Tensor = (values.flatten(-2)[..., :columns] - (1 << bits - 1)).to(torch.int8)
    return found


def dequantised(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q · s (…, columns), rounded once to a dtype."""
    made = dtype if dtype == torch.bfloat16 else torch.float32  # both factors are exact in bf16
    grouped = codes.unflatten(-1, (scales.shape[-1], -1)).to(made)
    found: torch.Tensor = (grouped * scales.to(made)[..., None]).flatten(-2).to(dtype)
    return found


def read_codes(tensors: Mapping[str, TensorInfo], name: str, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers (…, rows, columns; int8) and scales (…, rows, groups; bf16) of a tensor in a file.

    Raises
    ------
    GlobeError
        As `require_parts`.
    """
    words, scales, sizes = (read_tensor(tensors[name + part]) for part in (PACKED, SCALE, SHAPE))
    require_parts(name, (words, scales, sizes), packing)
    return unpack(words, packing.bits, scales.shape[-1] * packing.group), scales


def require_parts(name: str, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], packing: Packing) -> None:
    """Refuse words, scales and sizes that are not those of one tensor, and scales that are no scales.

    Raises
    ------
    GlobeError
        If the parts do not go together, or a scale is NaN, infinite, or zero.
    """
    words, scales, sizes = parts
    rows, columns = words.shape[-2], scales.shape[-1] * packing.group
    if scales.shape[:-1] != words.shape[:-1] or packing.words(columns) != words.shape[-1]:
        raise GlobeError(
            f"tensor {name}{SCALE} has shape {list(scales.shape)}, which does not go with {list(words.shape)} of "
            f"{name}{PACKED} in {packing.bits} bits and groups of {packing.group}: compress again"
        )
    if not bool((sizes == torch.tensor([rows, columns])).all()):
        raise GlobeError(
            f"tensor {name}{SHAPE} holds {sizes.flatten()[:2].tolist()}; expected {[rows, columns]}: compress again"
        )
    fine = scales.isfinite() & (scales != 0)
    if not bool(fine.all()):
        place = torch.nonzero(~fine)[0].tolist()
        value = float(scales[tuple(place)])
        raise GlobeError(
            f"tensor {name}{SCALE} holds {value:g} at {place}; expected finite scales other than 0: compress again"
        )


def _cell(bits: int) -> tuple[int, int]:
    """The fewest whole bytes that whole integers fill, and how many integers."""
    shared = math.gcd(bits, 8)
    return bits // shared, 8 // shared
