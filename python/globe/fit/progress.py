"""Where a training loop stands, in a form that a later process can go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from globe.errors import GlobeError
from globe.fit.sums import Measure, State
from globe.runs.store import MemoryStore, Store


@dataclass(frozen=True)
class Record:
    """One loop's line in metrics.json: the state it left, atoms that it re-seeded, and its wall time in seconds."""

    loop: int
    relative_error: float
    train_error: float
    validation_error: float | None
    support_median: float
    temperature: float
    over_relaxation: float
    irregular_codes: int
    reseeded: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """A loop about to begin: its number, what the loops before it found, and which state of theirs is best.

    `initial`, `previous` and `best_measure` are of the seeds, of the loop before, and of the best state; `seconds`
    of this loop are spent already. `first` is the loop that the seeds began with: 0, or -1 to be measured and spread.
    """

    relaxation: float
    loop: int = 0
    plateau: int = 0
    irregular: int = 0
    reseeded: int = 0
    best: int = 0
    first: int = 0
    seconds: float = 0.0
    initial: Measure | None = None
    previous: Measure | None = None
    best_measure: Measure | None = None
    history: list[Record] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        measures = {name: _plain(getattr(self, name)) for name in ("initial", "previous", "best_measure")}
        return {**asdict(replace(self, initial=None, previous=None, best_measure=None)), **measures}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Progress:
        """The inverse of `as_dict`."""
        measures = {name: _measure(values[name]) for name in ("initial", "previous", "best_measure")}
        return Progress(**{**values, **measures, "history": [Record(**record) for record in values["history"]]})


def _plain(measure: Measure | None) -> dict[str, Any] | None:
    return None if measure is None else {**asdict(measure), "expert_errors": measure.expert_errors.tolist()}


def _measure(values: dict[str, Any] | None) -> Measure | None:
    return None if values is None else Measure(**{**values, "expert_errors": np.array(values["expert_errors"])})


class States:
    """The states of a family's loops in a store: the newest, to go on from, and the best.

    Parameters
    ----------
    store : Store
        In memory if not given.
    name : str
        The family's.
    device : torch.device
        Where the banks belong.
    elapsed : callable
        The record so far of the stage that saves a state.

    Attributes
    ----------
    notes : dict
        Saved with every state, and read back by `find`: what a later process needs of the stages before.
    before : dict, optional
        The record of the loops that an earlier process did, read back by `find`.
    progress : Progress, optional
        That of the newest state, saved or found.
    """

    def __init__(
        self,
        store: Store | None = None,
        name: str = "family",
        device: torch.device | str = "cpu",
        elapsed: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._store: Store = store if store is not None else MemoryStore()
        self._name = name
        self._device = torch.device(device)
        self._elapsed = elapsed
        self.notes: dict[str, Any] = {}
        self.before: dict[str, Any] | None = None
        self.progress: Progress | None = None

    def save(self, state: State, progress: Progress) -> None:
        """Save the state that loop `progress.loop` begins with, and drop what is neither it nor the best."""
        meta = {
            "temperature": state.temperature,
            "progress": progress.as_dict(),
            "notes": self.notes,
            "elapsed": self._elapsed(),
        }
        tensors = {"bank": state.bank, "codes": torch.from_numpy(state.codes)}
        self._store.save(self._key(progress.loop), tensors, meta)
        self.progress = progress
        for loop in self._loops():
            if loop not in (progress.loop, progress.best):
                self._store.drop(self._key(loop))

    def find(self) -> Progress | None:
        """The progress of the newest state that the loops can go on from, with its notes.

        The best state has to be intact too. Below a damaged one only the best is left, whose own best is gone:
        it will be found the best again.
        """
        loops = self._loops()
        for loop in reversed(loops):
            meta = self._store.check(self._key(loop))
            if meta is None:
                continue
            progress = Progress.from_dict(meta["progress"])
            if progress.best != loop and (loop == loops[-1] or progress.best in loops):
                if self._store.check(self._key(progress.best)) is None:
                    continue
            self.notes = meta["notes"]
            self.before = meta["elapsed"] if loop != progress.first else None
            self.progress = progress
            return progress
        return None

    def load(self, loop: int) -> State:
        """The state that a loop begins with."""
        saved = self._store.load(self._key(loop))
        if saved is None:
            raise GlobeError(f"family {self._name}: the state of loop {loop} was damaged during the run; run it again")
        return State(saved.tensors["bank"].to(self._device), saved.array("codes"), saved.meta["temperature"])

    def clear(self) -> None:
        """Drop all states."""
        for loop in self._loops():
            self._store.drop(self._key(loop))

    def _key(self, loop: int) -> str:
        return f"{self._name}.loop-{loop}"

    def _loops(self) -> list[int]:
        prefix = self._key(0)[:-1]
        return sorted(int(name.removeprefix(prefix)) for name in self._store.names() if name.startswith(prefix))
