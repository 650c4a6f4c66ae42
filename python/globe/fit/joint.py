"""The joint fit: bank and codes together, by Gauss-Newton steps on the objective without left factors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.codes import supports
from globe.compute.gemm import matmul
from globe.fit.codes import entmax_alpha, one_atom_each, prune, spread, unit_codes
from globe.fit.dictionary import unit_atoms
from globe.fit.gauss_newton import Newton, newton_step
from globe.fit.joint_steps import Steps, noted, recall_joint, save_joint
from globe.fit.objective import Value
from globe.fit.pace import Pace
from globe.fit.point import Point, Vector
from globe.fit.problem import Problem
from globe.fit.sums import State
from globe.fit.support import Quadratic, above_target, newton_codes, shrink_support
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.settings import Settings, seconds_text
from globe.sizes.flops import error_flops, iteration_flops, pass_flops, weighing_flops

Array = NDArray[np.float64]

_SETTLING = 0.5  # share of the steps before which no plateau ends the fit
_ARMIJO = 1e-4
_REACH = 2.0  # of the size of a bank or an expert's variables, in one step
_NOTHING = 1e-9  # of the energy: the fp32 residual is rounding
_GAIN = 5  # tolerances: a step that lowers f by less ends the fit
_TRIALS = 10
_FASTER = 2  # a product in bf16 than in fp32, at least, where there are bf16 dot products


def fit_joint(problem: Problem, start: State, job: Job, advance: Advance) -> tuple[State, Steps]:
    """Minimise Σ_i ‖W'_i − A_i Σ_j α_ij B'_j‖² over bank and codes, every A_i being the best for them.

    Variable projection (Golub & Pereyra, 1973) in Kaufman's form (1975), every Gauss-Newton step solved by
    preconditioned conjugate gradients on what the last pass kept of each expert (:mod:`globe.fit.gauss_newton`), with
    Armijo's rule (1966) for its length. The bank is moved to coordinates in which the mean of B̃'B̃'ᵀ is the identity
    and codes are made to sum to one (f does not change: A_i absorbs both), and the state is saved. Non-negative codes
    are squares of the variables on their support, which is the form of entmax-1.5 above its threshold; for entmax and
    sparsemax supports above the target shrink to it by temperature in the first step, which starts from what is left.
    Where every expert starts from one atom, others up to the target support come in by chance first.

    With a turn a step is taken only if it will be done in time; where none will, supports shrink all the same.

    Parameters
    ----------
    problem : Problem
    start : State
        The warm start. The memory of its bank is taken.
    job : Job
        Settings `joint_steps`, `cg_steps`, `codes`, `support`, `epsilon`, `tolerance`; the store keeps the newest
        state, and a fit that is found there goes on. The `turn`, if there is one.
    advance : callable
    """
    started, settings, name = time.perf_counter(), job.settings, problem.family.name
    state, previous, now = recall_joint(job, start, problem)
    bank, codes = state.bank, state.codes
    del start, state
    started -= now.seconds
    signed, told = settings.codes == "signed", False
    shares = _Shares.of(bank, problem)
    pace = Pace(job.turn, shares.product)

    def look(bank: torch.Tensor, codes: Array, seed: int | None) -> Value:
        part = shares.of_pass(seed is None, problem.made)
        return pace.a_pass(lambda: problem.look(bank, codes, seed, advance), part)

    bare = _spreads(codes, now, settings)  # of what f alone is known
    value = look(bank, codes, None if bare else settings.seed + now.step)
    if now.step == 0:
        now = replace(now, evaluations=1)
        if value.ridged:  # the warm start's coordinates may be far from the metric's
            bank = matmul(_centre(value.gram).to(bank.device), bank)
            value = look(bank, codes, None if bare else settings.seed)
            now = replace(now, evaluations=2)
    while now.stopped is None:
        median = float(np.median(supports(codes)))
        now = noted(replace(now, seconds=time.perf_counter() - started), value, median)
        job.log(f"{name}: step {now.step}: error {value.error:.5f}, median support {median:g}")
        changed, temperature = ranks.agreed(_supported(value, codes, now, settings))
        again = bare or changed is not None
        fitting = pace.steps(settings.joint_steps - now.step, settings.cg_steps, passes=int(again))
        now = replace(now, stopped=_ended(now, changed is None, settings) or (None if fitting.steps else "time_limit"))
        if job.turn is not None and not told and now.stopped in (None, "time_limit"):
            job.log(f"{name}: {seconds_text(max(0.0, pace.left()))}: {fitting.told()}")
            told = True
        if now.stopped == "time_limit" and changed is not None and median > settings.support:
            codes, now = changed, replace(now, temperature=temperature)
        if now.stopped is not None:
            break
        if again:
            codes = codes if changed is None else changed
            value = look(bank, codes, settings.seed + now.step)
            now = replace(now, evaluations=now.evaluations + 1, temperature=temperature)
        sent = ranks.sent()
        newton = pace.products(
            partial(newton_step, problem, Point(bank, codes, signed), value, previous, fitting.iterations),
            lambda found: found.iterations,
        )
        sent = ranks.sent() - sent
        bare = fitting.steps == 1
        step = newton.step
        line = _Line(
            partial(look, seed=None if bare else settings.seed + now.step + 1),
            Point(bank, codes, signed),
            replace(newton, step=Vector(ranks.assembled(step.bank, len(bank)), step.codes)),
            value.error,
            _centre(value.gram).to(bank.device),
        )
        del value
        found, tried = line.search(pace.fits_pass)
        now = replace(now, evaluations=now.evaluations + tried, iterations=now.iterations + newton.iterations)
        if now.step == 0 and ranks.size() > 1:
            each = sent / max(1, newton.iterations) / 1e6
            job.log(f"{name}: {each:,.1f} MB sent by each rank for a product in a step")
        if found is None:
            why = "no descent" if tried == _TRIALS else "time_limit"
            job.log(f"{name}: step {now.step}: no step lowers the error{' in time' * (tried < _TRIALS)}")
            now = replace(now, stopped=why)
            break
        bank, codes, value = found
        previous = Vector(matmul(line.centre, step.bank), step.codes)
        del line, newton, step, found  # a bank each
        now = replace(now, step=now.step + 1)
        save_joint(job, name, (State(bank, codes, now.temperature), previous), now)
    state = _finished(State(bank, codes, now.temperature), settings)
    return state, replace(now, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Line:
    """A line to search: f at a bank and codes, where the line begins and its direction, f there, coordinates Q."""

    look: Callable[[torch.Tensor, Array], Value]
    begin: Point
    newton: Newton
    error: float
    centre: torch.Tensor

    def search(self, more: Callable[[], bool]) -> tuple[tuple[torch.Tensor, Array, Value] | None, int]:
        """A bank and codes at which f falls enough (Armijo, 1966) and their value, and how often f was asked for.

        None where there is none in `_TRIALS`, or in as many as there was time for `more`.
        """
        size, slope = self._reach(), self.newton.slope
        for tried in range(1, _TRIALS + 1):
            if tried > 1 and not more():
                return None, tried - 1
            bank, codes, value = self._at(size)
            if value.error <= self.error + _ARMIJO * size * slope:
                return (bank, codes, value), tried
            rise = value.error - self.error - size * slope
            size *= max(0.1, min(0.5, -slope * size / (2 * rise))) if math.isfinite(rise) else 0.1
            del bank, value
        return None, _TRIALS

    def _at(self, size: float) -> tuple[torch.Tensor, Array, Value]:
        bank = torch.empty_like(self.begin.bank)
        for moved, atom, change in zip(bank, self.begin.bank, self.newton.step.bank, strict=True):
            moved.copy_(matmul(self.centre, atom.add(change, alpha=size)))
        codes = unit_codes(self.begin.moved(self.newton.step.codes, size))
        return bank, codes, self.look(bank, codes)

    def _reach(self) -> float:
        """The part of the step, at most 1, along which neither the bank nor any expert's variables triple."""
        step = self.newton.step
        sizes = np.linalg.norm(self.begin.variables, axis=1), np.linalg.norm(step.codes, axis=1)
        bank, change = (float(torch.linalg.vector_norm(part)) for part in (self.begin.bank, step.bank))
        parts = [_REACH * sizes[0] / np.maximum(sizes[1], 1e-300), np.array([_REACH * bank / max(change, 1e-300)])]
        return float(min(1.0, *(part.min() for part in parts)))


@dataclass(frozen=True)
class _Shares:
    """Of a pass: what a product with the Gauss-Newton matrix, f alone, and making W'_i take, by their operations."""

    product: float
    error: float
    weighing: float

    @staticmethod
    def of(bank: torch.Tensor, problem: Problem) -> _Shares:
        (m, r, d), p, weighed = bank.shape, problem.family.p, problem.metric is not None
        whole = pass_flops(p, d, r, m, weighed)
        product = iteration_flops(d, r, m, weighed) / (_FASTER if problem.kept == torch.bfloat16 else 1)
        mixes_rows = weighed and "down" in problem.family.families
        weighing = weighing_flops(p, d, mixes_rows) if weighed else 0
        return _Shares(product / whole, error_flops(p, d, r, m, weighed) / whole, weighing / whole)

    def of_pass(self, bare: bool, made: bool) -> float:
        """What one takes that asks for f alone, or for all; with W'_i unless they are made."""
        return (self.error if bare else 1.0) + (0.0 if made else self.weighing)


def _centre(gram: torch.Tensor) -> torch.Tensor:
    """Q (r, r), fp32, such that the mean of (Q B̃')(Q B̃')ᵀ is the identity: B_j → Q B_j, A_i → A_i Q⁻¹."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=1e-9 * float(values[-1]))
    found: torch.Tensor = ((vectors * values.rsqrt()) @ vectors.T).float()
    return found


def _supported(value: Value, codes: Array, now: Steps, settings: Settings) -> tuple[Array | None, float]:
    """Codes on supports that the settings ask for, and their temperature; None where they are on such already."""
    if above_target(codes, settings):
        model = Quadratic(value.curvature, codes, value.codes)
        kept, temperature = shrink_support(model, newton_codes(model), settings.support, entmax_alpha(settings))
        return unit_codes(kept), temperature
    if _spreads(codes, now, settings):
        others = min(settings.support, codes.shape[1]) - 1
        # together about as much as their own
        return unit_codes(spread(codes, others, 2 / others, settings.seed)), now.temperature
    return None, now.temperature


def _spreads(codes: Array, now: Steps, settings: Settings) -> bool:
    """Whether codes are of one atom each, and others come in by chance."""
    return now.step == 0 and settings.codes != "signed" and settings.support > 1 and one_atom_each(codes)


def _ended(now: Steps, met: bool, settings: Settings) -> str | None:
    """Why the fit ends here, supports being `met`, if it does."""
    error = now.history[-1].error
    if error <= _NOTHING and met:
        return "exact"
    if now.step >= settings.joint_steps:
        return "joint_steps"
    settled = met and now.step >= _SETTLING * settings.joint_steps and len(now.history) > 1
    if settled and now.history[-2].error - error < _GAIN * settings.tolerance * now.history[-2].error:
        return "plateau"
    return None


def _finished(state: State, settings: Settings) -> State:
    """Unit atoms, and codes pruned, of absolute sum one."""
    bank, codes = unit_atoms(state.bank, state.codes)
    if settings.codes != "signed":
        codes = prune(codes, settings.epsilon)
    return State(bank, unit_codes(codes), state.temperature)
