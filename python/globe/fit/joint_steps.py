"""How far a joint fit has come: its history, and its states in the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.fit.codes import unit_codes
from globe.fit.objective import Value
from globe.fit.point import Vector
from globe.fit.problem import Problem
from globe.fit.sums import State
from globe.runs.job import Job
from globe.runs.store import Store

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """A step's line in metrics.json: f before it, the codes, CG iterations so far, wall seconds since the fit began."""

    step: int
    evaluations: int
    iterations: int
    error: float
    support_median: float
    temperature: float
    ridged: int
    seconds: float


@dataclass(frozen=True)
class Steps:
    """How far the joint fit has come, and what the steps before found."""

    temperature: float
    step: int = 0
    evaluations: int = 0
    iterations: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    history: list[Segment] = field(default_factory=list)

    @property
    def initial_support(self) -> float:
        """The median support before the first step."""
        return self.history[0].support_median

    @property
    def lost(self) -> bool:
        """Whether codes that started with one atom, and were spread, have not come back to the error of the start."""
        first, last = self.history[0], self.history[-1]
        return first.support_median == 1 and last.error > first.error

    def report(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {
            "steps": self.step,
            "evaluations": self.evaluations,
            "iterations": self.iterations,
            "stopped": self.stopped,
            "history": [asdict(segment) for segment in self.history],
        }


def noted(now: Steps, value: Value, median: float) -> Steps:
    """The history with a line on where the fit is."""
    line = Segment(
        now.step, now.evaluations, now.iterations, value.error, median, now.temperature, value.ridged, now.seconds
    )
    return replace(now, history=[*now.history, line])


def save_joint(job: Job, name: str, reached: tuple[State, Vector], now: Steps) -> None:
    """Keep the state that a step reached, with the step, in place of the state before."""
    mine, (state, previous) = f"{name}.joint-{now.step}", reached
    step = ranks.assembled(previous.bank, len(state.bank))
    tensors = {"bank": state.bank, "codes": torch.from_numpy(state.codes)}
    tensors |= {"step": step, "step.codes": torch.from_numpy(previous.codes)}
    job.store.save(mine, tensors, {**asdict(now), "elapsed": job.stages.so_far()})
    drop_joint(job.store, name, but=mine)  # after: a process that ends in between loses no step


def recall_joint(job: Job, start: State, problem: Problem) -> tuple[State, Vector | None, Steps]:
    """The newest state that was saved of a pool's joint fit, with the step to it; the start where there is none."""
    found = (job.store.load(key) for key in _keys(job.store, problem.family.name))
    saved = next((each for each in found if each is not None), None)
    if saved is None:
        return replace(start, codes=unit_codes(start.codes)), None, Steps(start.temperature)
    meta = {key: value for key, value in saved.meta.items() if key != "elapsed"}
    now = Steps(**{**meta, "history": [Segment(**line) for line in meta["history"]]})
    state, step = (saved.tensors[kind].to(problem.device) for kind in ("bank", "step"))
    step = step[ranks.atoms(len(step))]
    return State(state, saved.array("codes"), now.temperature), Vector(step, saved.array("step.codes")), now


def joint_before(store: Store, name: str) -> dict[str, Any] | None:
    """The record of the part of a joint fit that an earlier process did."""
    for key in _keys(store, name):
        meta = store.check(key)
        if meta is not None:
            return dict(meta["elapsed"])
    return None


def drop_joint(store: Store, name: str, but: str = "") -> None:
    """Drop the states of a pool's joint fit, but for one."""
    for key in _keys(store, name):
        if key != but:
            store.drop(key)


def _keys(store: Store, name: str) -> list[str]:
    """The states of a pool's joint fit, the newest first."""
    prefix = f"{name}.joint-"
    steps = [int(key.removeprefix(prefix)) for key in store.names() if key.startswith(prefix)]
    return [f"{prefix}{step}" for step in sorted(steps, reverse=True)]
