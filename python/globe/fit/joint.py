"""The joint fit: bank and codes together, by preconditioned L-BFGS on the objective without left factors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.codes import supports
from globe.compute.gemm import matmul
from globe.fit.codes import entmax_alpha, one_atom_each, prune, spread
from globe.fit.dictionary import unit_atoms
from globe.fit.quasi_newton import Pairs, Point, Preconditioner, Vector, move_atoms
from globe.fit.sums import State
from globe.fit.support import Quadratic, newton_codes, shrink_support
from globe.fit.variable_projection import Curvature, Problem, Value
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.runs.store import Store
from globe.settings import Settings

Array = NDArray[np.float64]

_SEGMENT = 10  # steps between two looks at the curvature
_SHRINKING = 0.6  # share of the steps by which the supports are at their target
_ARMIJO = 1e-4
_NOTHING = 1e-9  # of the energy: the fp32 residual is rounding
_TRIALS = 10


@dataclass(frozen=True)
class Segment:
    """Some steps' line in metrics.json: f, the codes, and wall seconds since the joint fit began."""

    step: int
    evaluations: int
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
            "stopped": self.stopped,
            "history": [asdict(segment) for segment in self.history],
        }


def fit_joint(problem: Problem, start: State, job: Job, advance: Advance) -> tuple[State, Steps]:
    """Minimise Σ_i ‖W'_i − A_i Σ_j α_ij B'_j‖² over bank and codes, every A_i being the best for them.

    Variable projection (Golub & Pereyra, 1973) with L-BFGS (Nocedal, 1980). Every `_SEGMENT` steps one more pass finds
    the Gauss-Newton blocks that precondition it, bank and pairs are moved to coordinates in which the mean of
    B̃'B̃'ᵀ is the identity and codes sum to one (f does not change: A_i absorbs both), and the state is saved.
    Non-negative codes are squares of the variables on their support, which is the form of entmax-1.5 above its
    threshold; for entmax and sparsemax the supports shrink to the target by temperature over the first part of the
    steps. Where every expert starts from one atom, others up to the target support come in by chance first.

    Parameters
    ----------
    problem : Problem
    start : State
        The warm start. The memory of its bank is taken.
    job : Job
        Settings `joint_steps`, `codes`, `support`, `epsilon`, `tolerance`; at most `blocks.pairs` pairs of differences
        are stored; the store keeps the state of the last segment, and a fit that is found there goes on.
    advance : callable
    """
    started, settings, name = time.perf_counter(), job.settings, problem.family.name
    state, now, memory = _recall(job, start, problem)
    bank, codes = state.bank, state.codes
    del start, state  # banks are what takes the memory: here and below they change in place
    started -= now.seconds
    signed = settings.codes == "signed"
    while now.stopped is None:
        _save(job, name, State(bank, codes, now.temperature), now, memory)
        codes = _sized(codes, memory, signed)
        value, curvature = problem.curvature(bank, codes, settings.seed + now.step, advance)
        if value.ridged and now.step == 0:  # the warm start's coordinates may be far from the metric's
            _recentre(bank, memory, value, curvature)
            del value, curvature
            value, curvature = problem.curvature(bank, codes, settings.seed, advance)
            now = replace(now, evaluations=now.evaluations + 1)
        median = float(np.median(supports(codes)))
        line = Segment(
            now.step,
            now.evaluations + 1,
            value.error,
            median,
            now.temperature,
            value.ridged,
            time.perf_counter() - started,
        )
        job.log(f"{name}: step {now.step}: error {value.error:.5f}, median support {median:g}")
        now = replace(now, history=[*now.history, line], evaluations=now.evaluations + 1, seconds=line.seconds)
        wanted = _wanted_support(now, settings)
        met = wanted is None or median <= settings.support
        if now.step >= settings.joint_steps or (value.error <= _NOTHING and met):
            now = replace(now, stopped="joint_steps" if value.error > _NOTHING else "exact")
            break
        if _plateau(now, settings) and met:
            now = replace(now, stopped="plateau")
            break
        if now.step == 0 and not signed and settings.support > 1 and one_atom_each(codes):
            others = min(settings.support, len(bank)) - 1
            codes = spread(codes, others, 2 / others, settings.seed)  # together about as much as their own
            del value, curvature
            value, curvature = problem.curvature(bank, codes, settings.seed, advance)
            now = replace(now, evaluations=now.evaluations + 1)
        elif wanted is not None and median > wanted:
            model = Quadratic(curvature.codes, codes, value.codes)
            codes, temperature = shrink_support(model, newton_codes(model), wanted, entmax_alpha(settings))
            memory.clear()
            del value, model
            value = problem.evaluate(bank, codes, advance)
            now = replace(now, temperature=temperature, evaluations=now.evaluations + 1)
        _recentre(bank, memory, value, curvature)
        preconditioner = Preconditioner(curvature, problem.metric is not None)
        steps = min(_SEGMENT, settings.joint_steps - now.step)
        descent = _Descent(partial(problem.evaluate, advance=advance), preconditioner, memory)
        codes, taken, evaluations = _descend(descent, Point(bank, codes, signed), value, steps)
        del value, curvature, preconditioner, descent
        now = replace(now, step=now.step + steps, evaluations=now.evaluations + evaluations)
        if taken == 0 and met:
            job.log(f"{name}: step {now.step}: no step lowers the error")
            now = replace(now, stopped="no descent")
    state = _finished(State(bank, codes, now.temperature), settings)
    return state, replace(now, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Descent:
    """What steps are taken with: f at a bank and codes, the preconditioner, and the pairs of differences so far."""

    evaluate: Callable[[torch.Tensor, Array], Value]
    preconditioner: Preconditioner
    memory: Pairs


def _descend(descent: _Descent, point: Point, value: Value, steps: int) -> tuple[Array, int, int]:
    """L-BFGS steps from a point, whose bank moves in place, as does the value's: codes, steps, evaluations."""
    error, slope, memory = value.error, point.slope(value), descent.memory
    taken = evaluations = 0
    while taken < steps:
        direction = memory.direction(slope, partial(descent.preconditioner, point=point))
        decrease = slope.dot(direction)
        if decrease >= 0:
            if not len(memory):
                break
            memory.clear()
            continue
        trial, found, size, tried = _search(descent, point, error, direction, decrease)
        evaluations += tried
        if found is None:
            if not len(memory):
                break
            memory.clear()
            continue
        new = trial.slope(found)
        memory.add(direction.mul_(size), slope.mul_(-1.0).add_(new, 1.0))
        slope.bank.copy_(new.bank)
        point, error, slope = trial, found.error, Vector(slope.bank, new.codes)
        del found, new, direction
        taken += 1
    return point.codes, taken, evaluations


def _search(
    descent: _Descent, point: Point, error: float, direction: Vector, decrease: float
) -> tuple[Point, Value | None, float, int]:
    """A point on a line at which the error falls enough (Armijo, 1966), its value, the step's size, evaluations.

    Where there is none the value is None, and the bank is back where it was.
    """
    size, gone = point.reach(direction), 0.0
    for tried in range(1, _TRIALS + 1):
        trial = point.moved(direction, size, gone)
        found = descent.evaluate(trial.bank, trial.codes)
        if found.error <= error + _ARMIJO * size * decrease:
            return trial, found, size, tried
        gone, rise = size, found.error - error - size * decrease
        size *= max(0.1, min(0.5, -decrease * size / (2 * rise))) if math.isfinite(rise) else 0.1
        del found
    return point.moved(direction, 0.0, gone), None, 0.0, _TRIALS


def _sized(codes: Array, memory: Pairs, signed: bool) -> Array:
    """Codes of absolute sum one, and the pairs of their variables: f does not depend on the size of α_i."""
    size: Array = np.abs(codes).sum(1, keepdims=True)
    memory.resize(1 / size if signed else np.sqrt(1 / size))
    sized: Array = codes / size
    return sized


def _recentre(bank: torch.Tensor, memory: Pairs, value: Value, curvature: Curvature) -> None:
    """Everything, in place, in coordinates in which the mean of B̃'B̃'ᵀ is the identity: B_j → Q B_j, A_i → A_i Q⁻¹."""
    values, vectors = torch.linalg.eigh(curvature.gram)
    values = values.clamp(min=1e-9 * float(values[-1]))
    forward = ((vectors * values.rsqrt()) @ vectors.T).float().to(bank.device)
    backward = ((vectors * values.sqrt()) @ vectors.T).float().to(bank.device)
    memory.move(forward, backward)
    move_atoms(bank, forward)
    move_atoms(value.bank, backward)
    for left in curvature.lefts:
        moved = matmul(matmul(backward, left), backward)
        left.copy_((moved + moved.mT) / 2)


def _wanted_support(now: Steps, settings: Settings) -> float | None:
    """The median support that the schedule allows by now, falling geometrically; None where nothing is steered."""
    if settings.codes not in ("entmax", "sparsemax"):
        return None
    share = min(1.0, (now.step + _SEGMENT) / max(_SHRINKING * settings.joint_steps, 1))
    first, last = max(now.initial_support, settings.support), settings.support
    return float(first * (last / first) ** share)


def _plateau(now: Steps, settings: Settings) -> bool:
    if len(now.history) < 2:
        return False
    before, last = now.history[-2].error, now.history[-1].error
    return before - last < _SEGMENT * settings.tolerance * before and now.step >= _SHRINKING * settings.joint_steps


def _finished(state: State, settings: Settings) -> State:
    """Unit atoms, and codes pruned, of absolute sum one."""
    bank, codes = unit_atoms(state.bank, state.codes)
    if settings.codes != "signed":
        codes = prune(codes, settings.epsilon)
    return State(bank, codes / np.abs(codes).sum(1, keepdims=True), state.temperature)


def _save(job: Job, name: str, state: State, now: Steps, memory: Pairs) -> None:
    tensors = {"bank": state.bank, "codes": torch.from_numpy(state.codes)}
    for place, (step, slope) in enumerate(zip(memory.steps, memory.slopes, strict=True)):
        tensors |= {f"step-{place}": step.bank, f"step-{place}.codes": torch.from_numpy(step.codes)}
        tensors |= {f"slope-{place}": slope.bank, f"slope-{place}.codes": torch.from_numpy(slope.codes)}
    mine = f"{name}.joint-{now.step}"
    job.store.save(mine, tensors, {**asdict(now), "pairs": len(memory), "elapsed": job.stages.so_far()})
    drop_joint(job.store, name, but=mine)  # after: a process that ends in between loses no step


def _recall(job: Job, start: State, problem: Problem) -> tuple[State, Steps, Pairs]:
    memory = Pairs(job.blocks.pairs)
    found = (job.store.load(key) for key in _keys(job.store, problem.family.name))
    saved = next((each for each in found if each is not None), None)
    if saved is None:
        return start, Steps(start.temperature), memory
    meta = {key: value for key, value in saved.meta.items() if key != "elapsed"}
    device = problem.device
    for place in range(meta.pop("pairs")):
        for kind, kept in (("step", memory.steps), ("slope", memory.slopes)):
            kept.append(Vector(saved.tensors[f"{kind}-{place}"].to(device), saved.array(f"{kind}-{place}.codes")))
    history = [Segment(**line) for line in meta.pop("history")]
    now = Steps(**meta, history=history)
    return State(saved.tensors["bank"].to(device), saved.array("codes"), now.temperature), now, memory


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
