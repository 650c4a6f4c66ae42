"""The banks of a model, held once for all its layers, and the mixtures B̃_i = Σ_j α_ij B_j composed of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import nn

from globe import kernels
from globe.artifact.factored import bank_name
from globe.compute.gemm import to_numpy
from globe.errors import GlobeError
from globe.hf.cache import MixtureCache

Shapes = dict[str, tuple[int, ...]]

_COMPOSED = (torch.float32, torch.bfloat16, torch.float16)


class _AsStored(nn.Module):
    """Buffers that keep the dtype in which they are stored when the model takes another."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _AsStored:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self


class _Codes(_AsStored):
    """Codes α (N × m) in CSR form, with the names that their tensors have in the files."""

    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int, nonzeros: int) -> None:
        super().__init__()
        self.register_buffer("indptr", torch.empty(rows + 1, dtype=torch.int32))
        self.register_buffer("indices", torch.empty(nonzeros, dtype=torch.int32))
        self.register_buffer("values", torch.empty(nonzeros, dtype=torch.float32))


class Bank(_AsStored):
    """One bank: atoms (m, r, d) in bf16 and codes.

    Parameters
    ----------
    name : str
        As in the tensors' names.
    shapes : dict
        Of the tensors in the files.
    """

    atoms: torch.Tensor
    codes: _Codes

    def __init__(self, name: str, shapes: Shapes) -> None:
        super().__init__()
        atoms, indptr, indices = (shapes[bank_name(name, part)] for part in ("atoms", "codes.indptr", "codes.indices"))
        self.name = name
        self.register_buffer("atoms", torch.empty(atoms, dtype=torch.bfloat16))
        self.codes = _Codes(indptr[0] - 1, indices[0])
        self._rows: scipy.sparse.csr_array | None = None

    @property
    def rank(self) -> int:
        """Rows r of an atom."""
        return int(self.atoms.shape[1])

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
        within = not len(indices) or (indices.min() >= 0 and indices.max() < len(self.atoms))
        self._require(bool(within), "codes.indices", f"atoms from 0 to {len(self.atoms) - 1}")
        self._require(bool(np.isfinite(values).all()), "codes.values", "finite values")
        finite = all(bool(atom.isfinite().all()) for atom in self.atoms)
        self._require(finite, "atoms", "finite values")
        self._rows = scipy.sparse.csr_array((values, indices, indptr), shape=(len(indptr) - 1, len(self.atoms)))

    def _require(self, condition: bool, part: str, expected: str) -> None:
        if not condition:
            where = bank_name(self.name, part)
            raise GlobeError(f"tensor {where} is damaged; expected {expected}: compress again")

    def compose(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        """B̃ of a row of the codes, (r, d), on the bank's device, summed in fp32 and rounded once."""
        if self._rows is None:
            self.prepare()
        assert self._rows is not None
        span = slice(self._rows.indptr[row], self._rows.indptr[row + 1])
        numbers, values = self._rows.indices[span], self._rows.data[span]
        # Not in inference mode: the cache outlives it, and an inference tensor is of no use to autograd.
        with torch.inference_mode(False), torch.no_grad():
            if self.atoms.device.type != "cpu":
                chosen = self.atoms[torch.from_numpy(numbers).to(self.atoms.device)].float()
                weights = torch.from_numpy(values).to(self.atoms.device)
                return (weights @ chosen.flatten(1)).view(self.atoms.shape[1:]).to(dtype)
            composed = torch.empty(1, *self.atoms.shape[1:], dtype=dtype if dtype in _COMPOSED else torch.float32)
            codes = scipy.sparse.csr_array((values, numbers, (0, len(numbers))), shape=(1, len(self.atoms)))
            kernels.compose(codes, to_numpy(self.atoms), out=to_numpy(composed))
            return composed[0].to(dtype)


class Banks(nn.Module):
    """All banks of a model and the cache of their mixtures. Its tensors are named as in the files.

    Parameters
    ----------
    names : iterable of str
        The banks.
    shapes : dict
        Shapes of the tensors in the files.
    """

    def __init__(self, names: Iterable[str], shapes: Shapes) -> None:
        super().__init__()
        self.cache = MixtureCache()
        for name in names:
            place: nn.Module = self
            *parents, last = bank_name(name, "").strip(".").split(".")[1:]
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(last, Bank(name, shapes))

    @property
    def banks(self) -> dict[str, Bank]:
        """The banks by name."""
        return {module.name: module for module in self.modules() if isinstance(module, Bank)}

    def mixture(self, bank: Bank, row: int, like: torch.Tensor) -> torch.Tensor:
        """B̃ of a row of the codes, in the dtype and on the device of another tensor, from the cache if it is there."""
        key = (bank.name, row, like.dtype, like.device)
        return self.cache.get(key, lambda: bank.compose(row, like.dtype).to(like.device))

    def stats(self) -> dict[str, Any]:
        """What `model.globe_stats()` tells: the cache's hits, misses, hit rate and bytes, and those of the banks."""
        cache = self.cache.stats()
        stored = sum(math.prod(buffer.shape) * buffer.element_size() for buffer in self.buffers())
        return {**vars(cache), "hit_rate": cache.hit_rate, "bank_bytes": stored}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Banks:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cache.clear()
        return self
