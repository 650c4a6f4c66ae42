"""The joint fit: bank and codes together, by preconditioned L-BFGS on the objective without left factors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.codes import entmax_alpha, prune, supports
from globe.dictionary import unit_atoms
from globe.gemm import matmul
from globe.quasi_newton import Pairs, Point, Preconditioner, Vector
from globe.runstore import Store
from globe.settings import Settings
from globe.stages import Advance
from globe.support import newton_codes, shrink_support
from globe.sweep import State
from globe.variable_projection import Curvature, Problem, Value

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
class Joint:
    """Where the joint fit stands: its state, and what the steps before found."""

    state: State
    step: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    history: list[Segment] = field(default_factory=list)

    @property
    def initial_support(self) -> float:
        """The median support before the first step."""
        return self.history[0].support_median

    def report(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {
            "steps": self.step,
            "evaluations": self.evaluations,
            "stopped": self.stopped,
            "history": [asdict(segment) for segment in self.history],
        }


def fit_joint(
    problem: Problem,
    start: State,
    settings: Settings,
    pairs: int,
    store: Store,
    name: str,
    elapsed: Callable[[], dict[str, Any]] = dict,
    advance: Advance = lambda steps: None,
    log: Callable[[str], None] = lambda line: None,
) -> Joint:
    """Minimise Σ_i ‖W'_i − A_i Σ_j α_ij B'_j‖² over bank and codes, every A_i being the best for them.

    Variable projection (Golub & Pereyra, 1973) with L-BFGS (Nocedal, 1980). Every `_SEGMENT` steps one more pass finds
    the Gauss-Newton blocks that precondition it, bank and pairs are moved to coordinates in which the mean of
    B̃'B̃'ᵀ is the identity and codes sum to one (f does not change: A_i absorbs both), and the state is saved.
    Non-negative codes are squares of the variables on their support, which is the form of entmax-1.5 above its
    threshold; for entmax and sparsemax the supports shrink to the target by temperature over the first part of the
    steps.

    Parameters
    ----------
    problem : Problem
    start : State
        The warm start.
    settings : Settings
        `joint_steps`, `codes`, `support`, `epsilon`, `tolerance`.
    pairs : int
        Most stored pairs of differences.
    store : Store
        Keeps the state of the last segment; a fit that is found there goes on.
    name : str
        The pool's.
    elapsed : callable
        The record so far of the stage.
    advance, log : callable
    """
    started = time.perf_counter()
    now, memory = _recall(store, name, start, problem, pairs)
    started -= now.seconds
    signed = settings.codes == "signed"
    bank, codes = now.state.bank, now.state.codes
    while now.stopped is None:
        _save(store, name, replace(now, state=State(bank, codes, now.state.temperature)), memory, elapsed())
        codes = _sized(codes, memory, signed)
        value, curvature = problem.curvature(bank, codes, settings.seed + now.step, advance)
        if value.ridged and now.step == 0:  # the warm start's coordinates may be far from the metric's
            bank, *_ = _recentre(bank, memory, value, curvature)
            value, curvature = problem.curvature(bank, codes, settings.seed, advance)
            now = replace(now, evaluations=now.evaluations + 1)
        median = float(np.median(supports(codes)))
        line = Segment(
            now.step,
            now.evaluations + 1,
            value.error,
            median,
            now.state.temperature,
            value.ridged,
            time.perf_counter() - started,
        )
        log(f"{name}: step {now.step}: error {value.error:.5f}, median support {median:g}")
        now = replace(now, history=[*now.history, line], evaluations=now.evaluations + 1, seconds=line.seconds)
        wanted = _wanted_support(now, settings)
        met = wanted is None or median <= settings.support
        if now.step >= settings.joint_steps or (value.error <= _NOTHING and met):
            now = replace(now, stopped="joint_steps" if value.error > _NOTHING else "exact")
            break
        if _plateau(now, settings) and met:
            now = replace(now, stopped="plateau")
            break
        if wanted is not None and median > wanted:
            model = (curvature.codes, codes, value.codes)
            codes, temperature = shrink_support(*model, newton_codes(*model), wanted, entmax_alpha(settings))
            memory.clear()
            value = problem.evaluate(bank, codes, advance)
            now = replace(now, state=replace(now.state, temperature=temperature), evaluations=now.evaluations + 1)
        bank, value, curvature = _recentre(bank, memory, value, curvature)
        preconditioner = Preconditioner(curvature, problem.metric is not None)
        steps = min(_SEGMENT, settings.joint_steps - now.step)
        bank, codes, taken, evaluations = _descend(
            problem, Point(bank, codes, signed), value, preconditioner, memory, steps, advance
        )
        now = replace(now, step=now.step + steps, evaluations=now.evaluations + evaluations)
        if taken == 0 and met:
            log(f"{name}: step {now.step}: no step lowers the error")
            now = replace(now, stopped="no descent")
    state = _finished(State(bank, codes, now.state.temperature), settings)
    return replace(now, state=state, seconds=time.perf_counter() - started)


def _descend(
    problem: Problem,
    point: Point,
    value: Value,
    preconditioner: Preconditioner,
    memory: Pairs,
    steps: int,
    advance: Advance,
) -> tuple[torch.Tensor, Array, int, int]:
    """L-BFGS steps from a point: bank, codes, steps taken and evaluations made."""
    slope = point.slope(value)
    taken = evaluations = 0
    while taken < steps:
        direction = memory.direction(slope, lambda vector, here=point: preconditioner(vector, here))  # type: ignore[misc]
        decrease = slope.dot(direction)
        if decrease >= 0:
            if not len(memory):
                break
            memory.clear()
            continue
        size, found = point.reach(direction), None
        for _ in range(_TRIALS):
            trial = point.moved(direction, size)
            found = problem.evaluate(trial.bank, trial.codes, advance)
            evaluations += 1
            if found.error <= value.error + _ARMIJO * size * decrease:
                break
            rise = found.error - value.error - size * decrease
            size *= max(0.1, min(0.5, -decrease * size / (2 * rise))) if math.isfinite(rise) else 0.1
            found = None
        if found is None:
            if not len(memory):
                break
            memory.clear()
            continue
        new_slope = trial.slope(found)
        memory.add(direction.times(size), new_slope.minus(slope))
        point, value, slope = trial, found, new_slope
        taken += 1
    return point.bank, point.codes, taken, evaluations


def _sized(codes: Array, memory: Pairs, signed: bool) -> Array:
    """Codes of absolute sum one, and the pairs of their variables: f does not depend on the size of α_i."""
    size: Array = np.abs(codes).sum(1, keepdims=True)
    memory.resize(1 / size if signed else np.sqrt(1 / size))
    sized: Array = codes / size
    return sized


def _recentre(
    bank: torch.Tensor, memory: Pairs, value: Value, curvature: Curvature
) -> tuple[torch.Tensor, Value, Curvature]:
    """Everything in coordinates in which the mean of B̃'B̃'ᵀ is the identity: B_j → Q B_j, A_i → A_i Q⁻¹.

    The pairs are moved in place.
    """
    values, vectors = torch.linalg.eigh(curvature.gram)
    values = values.clamp(min=1e-9 * float(values[-1]))
    forward = ((vectors * values.rsqrt()) @ vectors.T).float().to(bank.device)
    backward = ((vectors * values.sqrt()) @ vectors.T).float().to(bank.device)
    memory.move(forward, backward)
    lefts = matmul(matmul(backward, curvature.lefts), backward)
    value = replace(value, bank=matmul(backward, value.bank))
    return matmul(forward, bank), value, replace(curvature, lefts=(lefts + lefts.mT) / 2)


def _wanted_support(now: Joint, settings: Settings) -> float | None:
    """The median support that the schedule allows by now, falling geometrically; None where nothing is steered."""
    if settings.codes not in ("entmax", "sparsemax"):
        return None
    share = min(1.0, (now.step + _SEGMENT) / max(_SHRINKING * settings.joint_steps, 1))
    first, last = max(now.initial_support, settings.support), settings.support
    return float(first * (last / first) ** share)


def _plateau(now: Joint, settings: Settings) -> bool:
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


def _save(store: Store, name: str, now: Joint, memory: Pairs, elapsed: dict[str, Any]) -> None:
    tensors = {"bank": now.state.bank, "codes": torch.from_numpy(now.state.codes)}
    for place, (step, slope) in enumerate(zip(memory.steps, memory.slopes, strict=True)):
        tensors |= {f"step-{place}": step.bank, f"step-{place}.codes": torch.from_numpy(step.codes)}
        tensors |= {f"slope-{place}": slope.bank, f"slope-{place}.codes": torch.from_numpy(slope.codes)}
    meta = {key: value for key, value in asdict(replace(now, state=_NO_STATE)).items() if key != "state"}
    store.save(
        _key(name), tensors, {**meta, "temperature": now.state.temperature, "pairs": len(memory), "elapsed": elapsed}
    )


def _recall(store: Store, name: str, start: State, problem: Problem, pairs: int) -> tuple[Joint, Pairs]:
    memory = Pairs(pairs)
    saved = store.load(_key(name))
    if saved is None:
        return Joint(start), memory
    meta = {key: value for key, value in saved.meta.items() if key != "elapsed"}
    device = problem.device
    for place in range(meta.pop("pairs")):
        for kind, kept in (("step", memory.steps), ("slope", memory.slopes)):
            kept.append(Vector(saved.tensors[f"{kind}-{place}"].to(device), saved.array(f"{kind}-{place}.codes")))
    state = State(saved.tensors["bank"].to(device), saved.array("codes"), meta.pop("temperature"))
    history = [Segment(**line) for line in meta.pop("history")]
    return Joint(state, history=history, **meta), memory


_NO_STATE = State(torch.empty(0), np.empty((0, 0)), 1.0)


def joint_before(store: Store, name: str) -> dict[str, Any] | None:
    """The record of the part of a joint fit that an earlier process did."""
    meta = store.check(_key(name))
    return None if meta is None else dict(meta["elapsed"])


def _key(name: str) -> str:
    return f"{name}.joint"
