"""The banks of a model, held once for all its layers, and the mixtures B̃_i = Σ_j α_ij B_j composed of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import nn

from globe import kernels
from globe.artifact.factored import bank_name
from globe.checkpoint.formats.packed import PACKED, SCALE, SHAPE, Packing, dequantised, require_parts, unpack
from globe.compute.gemm import to_numpy
from globe.compute.spd import orthonormal_rows
from globe.errors import GlobeError
from globe.fit.rounding import round_nearest
from globe.hf.cache import MixtureCache

Shapes = dict[str, tuple[int, ...]]

_NONE: Mapping[str, Packing] = MappingProxyType({})
_GROUP = 32  # values of a cached mixture that share a scale
_COMPOSED = (torch.float32, torch.bfloat16, torch.float16)


class AsStored(nn.Module):
    """Buffers that keep the dtype in which they are stored when the model takes another."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AsStored:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self


class _Codes(AsStored):
    """Codes α (N × m) in CSR form, with the names that their tensors have in the files."""

    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int, nonzeros: int) -> None:
        super().__init__()
        self.register_buffer("indptr", torch.empty(rows + 1, dtype=torch.int32))
        self.register_buffer("indices", torch.empty(nonzeros, dtype=torch.int32))
        self.register_buffer("values", torch.empty(nonzeros, dtype=torch.float32))


class Bank(AsStored):
    """One bank: atoms (m, r, d) in bf16, or packed in integers and scales, and codes.

    Parameters
    ----------
    name : str
        As in the tensors' names.
    shapes : dict
        Of the tensors in the files.
    packing : Packing, optional
        Of the atoms.

    `orthonormal` is set where packed left factors multiply the mixtures: these have orthonormal rows then.
    """

    codes: _Codes

    def __init__(self, name: str, shapes: Shapes, packing: Packing | None = None) -> None:
        super().__init__()
        indptr, indices = (shapes[bank_name(name, part)] for part in ("codes.indptr", "codes.indices"))
        self.name, self.packing, self.orthonormal = name, packing, False
        if packing is None:
            self.register_buffer("atoms", torch.empty(shapes[bank_name(name, "atoms")], dtype=torch.bfloat16))
        else:
            words, scales = (shapes[bank_name(name, "atoms" + part)] for part in (PACKED, SCALE))
            register_packed(self, "atoms", words, scales)
        self.codes = _Codes(indptr[0] - 1, indices[0])
        self._rows: scipy.sparse.csr_array | None = None

    @property
    def rank(self) -> int:
        """Rows r of an atom."""
        return int(self.stored.shape[1])

    @property
    def stored(self) -> torch.Tensor:
        """Atoms in bf16, or the words that they are packed in."""
        found = self.atoms if self.packing is None else self.atoms_packed
        assert isinstance(found, torch.Tensor)
        return found

    def _chosen(self, numbers: torch.Tensor | slice) -> torch.Tensor:
        """Some atoms: bf16 as stored, or fp32 where they are packed."""
        if self.packing is None:
            return self.stored[numbers]
        return unpacked(self, "atoms", numbers, self.packing, torch.float32)

    def prepare(self) -> None:
        """Take the codes in hand, once they are loaded.

        Raises
        ------
        GlobeError
            If they are damaged.
        """
        indptr, indices, values = (
            part.cpu().numpy() for part in (self.codes.indptr, self.codes.indices, self.codes.values)
        )
        ascending = indptr[0] == 0 and indptr[-1] == len(indices) and (np.diff(indptr) >= 0).all()
        self._require(bool(ascending), "codes.indptr", f"ascending offsets from 0 to {len(indices)}")
        within = not len(indices) or (indices.min() >= 0 and indices.max() < len(self.stored))
        self._require(bool(within), "codes.indices", f"atoms from 0 to {len(self.stored) - 1}")
        self._require(bool(np.isfinite(values).all()), "codes.values", "finite values")
        if self.packing is None:
            finite = all(bool(atom.isfinite().all()) for atom in self.stored)
            self._require(finite, "atoms", "finite values")
        else:
            require_packed(self, "atoms", bank_name(self.name, "atoms"), self.packing)
        self._rows = scipy.sparse.csr_array((values, indices, indptr), shape=(len(indptr) - 1, len(self.stored)))

    def _require(self, condition: bool, part: str, expected: str) -> None:
        if not condition:
            where = bank_name(self.name, part)
            raise GlobeError(f"tensor {where} is damaged; expected {expected}: compress again")

    @property
    def rows(self) -> scipy.sparse.csr_array:
        """The codes, a row for each expert."""
        if self._rows is None:
            self.prepare()
        assert self._rows is not None
        return self._rows

    def compose(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        """B̃ of a row of the codes, (r, d), on the bank's device, summed in fp32 and rounded once.

        Where the bank is `orthonormal`, its rows are made so before they are rounded.
        """
        if not self.orthonormal:
            return self._composed(row, dtype)
        with torch.inference_mode(False), torch.no_grad():
            return orthonormal_rows(self._composed(row, torch.float32)[None])[0].to(dtype)

    def _composed(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        rows = self.rows
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        numbers, values = rows.indices[span], rows.data[span]
        # Not in inference mode: the cache outlives it, and an inference tensor is of no use to autograd.
        with torch.inference_mode(False), torch.no_grad():
            device = self.stored.device
            if device.type != "cpu":
                chosen = self._chosen(torch.from_numpy(numbers).to(device)).float()
                weights = torch.from_numpy(values).to(device)
                return (weights @ chosen.flatten(1)).view(chosen.shape[1:]).to(dtype)
            atoms = self.stored
            if self.packing is not None:
                atoms, numbers = self._chosen(torch.from_numpy(numbers)), np.arange(len(numbers), dtype=np.int32)
            composed = torch.empty(1, *atoms.shape[1:], dtype=dtype if dtype in _COMPOSED else torch.float32)
            codes = scipy.sparse.csr_array((values, numbers, (0, len(numbers))), shape=(1, len(atoms)))
            kernels.compose(codes, to_numpy(atoms), out=to_numpy(composed))
            return composed[0].to(dtype)


def bank_parts(packing: Packing | None) -> tuple[str, ...]:
    """What a bank's tensors are called after its name."""
    atoms = ("atoms",) if packing is None else ("atoms" + PACKED, "atoms" + SCALE, "atoms" + SHAPE)
    return (*atoms, "codes.indptr", "codes.indices", "codes.values")


def register_packed(module: nn.Module, name: str, words: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Give a module the buffers of a packed tensor (…, rows, columns), of the shapes that its parts have."""
    module.register_buffer(name + PACKED, torch.empty(words, dtype=torch.int32))
    module.register_buffer(name + SCALE, torch.empty(scales, dtype=torch.bfloat16))
    module.register_buffer(name + SHAPE, torch.empty((*words[:-2], 2), dtype=torch.int64))


def unpacked(
    module: nn.Module, name: str, some: torch.Tensor | slice | int, packing: Packing, dtype: torch.dtype
) -> torch.Tensor:
    """The values of some matrices of a packed tensor of a module."""
    words, scales = module.get_buffer(name + PACKED)[some], module.get_buffer(name + SCALE)[some]
    return dequantised(unpack(words, packing.bits, scales.shape[-1] * packing.group), scales, dtype)


def require_packed(module: nn.Module, name: str, told: str, packing: Packing) -> None:
    """Check a packed tensor of a module that is loaded; `told` is what it is called in an error.

    Raises
    ------
    GlobeError
        As :func:`globe.checkpoint.formats.packed.require_parts`.
    """
    words, scales, sizes = (module.get_buffer(name + part).cpu() for part in (PACKED, SCALE, SHAPE))
    require_parts(told, (words, scales, sizes), packing)


@dataclass(frozen=True)
class _Int8:
    """A mixture as integers of 8 bits with a scale for each group of a row."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def of(mixture: torch.Tensor) -> _Int8:
        """The nearest."""
        group = math.gcd(mixture.shape[1], _GROUP)
        found = round_nearest(mixture, 8, group)
        return _Int8(found.codes, found.scales.bfloat16())

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.codes.nbytes + self.scales.nbytes

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The mixture again."""
        return dequantised(self.codes, self.scales, dtype)


class Banks(nn.Module):
    """All banks of a model and the cache of their mixtures. Its tensors are named as in the files.

    Parameters
    ----------
    names : iterable of str
        The banks.
    shapes : dict
        Shapes of the tensors in the files.
    packings : mapping
        Of the banks whose atoms are packed.
    """

    def __init__(self, names: Iterable[str], shapes: Shapes, packings: Mapping[str, Packing] = _NONE) -> None:
        super().__init__()
        self.cache, self.bits = MixtureCache(), 16
        for name in names:
            place: nn.Module = self
            *parents, last = bank_name(name, "").strip(".").split(".")[1:]
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(last, Bank(name, shapes, packings.get(name)))

    @property
    def banks(self) -> dict[str, Bank]:
        """The banks by name."""
        return {module.name: module for module in self.modules() if isinstance(module, Bank)}

    def mixture(self, bank: Bank, row: int, like: torch.Tensor) -> torch.Tensor:
        """B̃ of a row of the codes, in the dtype and on the device of another tensor, from the cache if it is there.

        With `bits` of 8 the cache keeps integers and scales, and hands out their values.
        """
        if self.bits == 16:
            return self.cache.get(self._key(bank, row, like), lambda: self._composed(bank, row, like))
        held = self.cache.get(
            self._key(bank, row, like), lambda: _Int8.of(bank.compose(row, torch.float32).to(like.device))
        )
        return held.values(like.dtype)

    def held_mixture(self, bank: Bank, row: int, like: torch.Tensor) -> torch.Tensor | None:
        """As `mixture` with `bits` of 16, where the cache holds it or has room for it; None elsewhere."""
        size = math.prod(bank.stored.shape[1:]) * like.element_size()
        key = self._key(bank, row, like)
        return self.cache.get_without_eviction(key, lambda: self._composed(bank, row, like), size)

    def _key(self, bank: Bank, row: int, like: torch.Tensor) -> tuple[object, ...]:
        return bank.name, row, like.dtype, like.device, self.bits

    def _composed(self, bank: Bank, row: int, like: torch.Tensor) -> torch.Tensor:
        return bank.compose(row, like.dtype).to(like.device)

    def stats(self) -> dict[str, Any]:
        """What `model.globe_stats()` tells: the cache's hits, misses, hit rate and bytes, and those of the banks."""
        cache = self.cache.stats()
        stored = sum(math.prod(buffer.shape) * buffer.element_size() for buffer in self.buffers())
        return {**vars(cache), "hit_rate": cache.hit_rate, "bank_bytes": stored}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Banks:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cache.clear()
        return self
