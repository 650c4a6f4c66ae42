"""What corrections left in a job's store, a tensor at a time, for writing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from globe.checkpoint.family import Expert
from globe.errors import GlobeError
from globe.runs.store import Store


class Changed:
    """The tensors that are no longer the source's, each in a result of the store; the last one read stays in memory.

    Parameters
    ----------
    store : Store
    changed : mapping
        A tensor's name, and the result that has it.
    """

    def __init__(self, store: Store, changed: Mapping[str, str]) -> None:
        self._store, self._changed = store, changed
        self._held: tuple[str, dict[str, torch.Tensor]] = "", {}

    def tensor(self, name: str) -> torch.Tensor:
        """One of them: a dense tensor, or the left factors in its place.

        Raises
        ------
        GlobeError
            If its result is damaged.
        """
        result = self._changed[name]
        if result != self._held[0]:
            self._held = "", {}
            saved = self._store.load(result)
            if saved is None:
                raise GlobeError(f"tensor {name}: its correction was damaged during the run; run it again")
            self._held = result, saved.tensors
        return self._held[1][name]

    def left(self, expert: Expert) -> torch.Tensor | None:
        """An expert's left factor, if it was corrected."""
        if expert.tensor not in self._changed:
            return None
        found = self.tensor(expert.tensor)
        return found if expert.index is None else found[expert.index]
