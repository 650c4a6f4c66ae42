"""The store of a run that many ranks share: rank 0 answers for all, so that all go the same way."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from globe.compute import ranks
from globe.runs.store import SCRATCH, RunStore, Saved


class SharedStore:
    """A store on a folder that every rank has open.

    All ranks ask for and save the same results in the same order. What is asked is read, and what is saved is written,
    by rank 0; tensors go from there to the others. A rank that works alone (:func:`globe.compute.ranks.alone`) uses
    the folder itself.

    Parameters
    ----------
    store : RunStore
        This rank's view of the folder.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def names(self) -> list[str]:
        """As :meth:`globe.runs.store.Store.names`."""
        return ranks.lead(self._store.names)

    def check(self, name: str) -> dict[str, Any] | None:
        """As :meth:`globe.runs.store.Store.check`."""
        return ranks.lead(lambda: self._store.check(name))

    def load(self, name: str) -> Saved | None:
        """As :meth:`globe.runs.store.Store.load`."""
        if ranks.size() == 1:
            return self._store.load(name)
        found = self._store.load(name) if ranks.rank() == 0 else None
        told = ranks.agreed(None if found is None else _outline(found))
        if told is None:
            return None
        shapes, meta = told
        tensors = found.tensors if found is not None else {}
        for key, (shape, dtype) in shapes.items():
            tensors[key] = ranks.given(tensors[key].contiguous() if key in tensors else torch.empty(shape, dtype=dtype))
        return Saved(tensors, meta)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """As :meth:`globe.runs.store.Store.save`."""
        ranks.lead(lambda: self._store.save(name, tensors, meta))

    def drop(self, name: str) -> None:
        """As :meth:`globe.runs.store.Store.drop`."""
        ranks.lead(lambda: self._store.drop(name))

    def scratch(self) -> AbstractContextManager[str]:
        """An empty directory of this rank's own."""
        return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self._store.directory)


def _outline(saved: Saved) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], dict[str, Any]]:
    return {key: (value.shape, value.dtype) for key, value in saved.tensors.items()}, saved.meta
