"""Codes against SciPy and the optimality conditions; the temperature control on codes alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from families import Array
from globe import kernels
from globe.compute.codes import initial_codes, supports
from globe.fit.codes import TEMPERATURE_BOUNDS, Coding, coding_step, prune, update_temperature
from globe.kernels import NnlsStatus
from globe.settings import Settings

ATOMS, EXPERTS = 24, 30


class Problem:
    """Targets that are noisy mixtures of most of the atoms."""

    def __init__(self, seed: int, noise: float = 0.02) -> None:
        rng = np.random.default_rng(seed)
        self.bank = rng.standard_normal((ATOMS, 90))
        self.bank /= np.linalg.norm(self.bank, axis=1, keepdims=True)
        weights = rng.uniform(0.05, 1, (EXPERTS, ATOMS)) * (rng.random((EXPERTS, ATOMS)) < 0.7)
        self.targets = weights @ self.bank + noise * rng.standard_normal((EXPERTS, 90))
        self.gram = self.bank @ self.bank.T
        self.correlations = self.targets @ self.bank.T

    def code(self, temperature: float = 1.0, **settings: object) -> Coding:
        return coding_step(self.gram, self.correlations, Settings(**settings), temperature)  # type: ignore[arg-type]

    def nnls(self) -> Array:
        return np.array([scipy.optimize.nnls(self.bank.T, target)[0] for target in self.targets])


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(0)


def test_nnls_codes_are_scipys(problem: Problem) -> None:
    coding = problem.code(codes="nnls", epsilon=0.0)
    np.testing.assert_allclose(coding.codes, problem.nnls(), atol=1e-10)
    assert coding.logits is None
    assert coding.irregular == 0


def test_l1_meets_its_optimality_conditions(problem: Problem) -> None:
    codes = problem.code(codes="nnls", l1=0.2, epsilon=0.0).codes
    slack = problem.correlations - codes @ problem.gram - 0.2 * np.abs(problem.correlations).max(1, keepdims=True)
    np.testing.assert_allclose(slack[codes > 0], 0, atol=1e-10)
    assert slack.max() < 1e-10
    assert supports(codes).mean() < 0.8 * supports(problem.nnls()).mean()


def test_simplex_codes_meet_their_optimality_conditions(problem: Problem) -> None:
    codes = problem.code(codes="simplex", epsilon=0.0).codes
    np.testing.assert_allclose(codes.sum(1), 1, atol=1e-12)
    slack = problem.correlations - codes @ problem.gram
    multiplier = (slack * codes).sum(1, keepdims=True)  # the slack of all used atoms
    np.testing.assert_allclose(np.where(codes > 0, slack - multiplier, 0), 0, atol=1e-9)
    assert (slack - multiplier).max() < 1e-9


@pytest.mark.parametrize("kind", ["nnls", "simplex"])
def test_initial_codes(problem: Problem, kind: str) -> None:
    codes, wanted = initial_codes(problem.gram, problem.correlations, kind), problem.nnls()
    np.testing.assert_allclose(codes, wanted / (wanted.sum(1, keepdims=True) if kind == "simplex" else 1), atol=1e-10)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.03])
@pytest.mark.parametrize("temperature", [0.03, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("codes", "alpha"), [("entmax", 1.5), ("entmax", 1.2), ("sparsemax", 2.0)])
def test_logits_give_the_codes_back(
    codes: str, alpha: float, temperature: float, epsilon: float, problem: Problem
) -> None:
    coding = problem.code(temperature, codes=codes, entmax_alpha=alpha, epsilon=epsilon)
    assert coding.logits is not None
    np.testing.assert_allclose(coding.codes.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(kernels.entmax(coding.logits, alpha, temperature=temperature), coding.codes, atol=1e-9)
    assert coding.codes[coding.codes > 0].min() >= epsilon


@pytest.mark.parametrize("codes", ["entmax", "sparsemax"])
def test_at_temperature_one_codes_are_nnls_on_the_simplex(codes: str, problem: Problem) -> None:
    wanted = problem.nnls()
    found = problem.code(1.0, codes=codes, epsilon=0.0).codes
    np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 0.5])
def test_values_are_refitted_on_the_chosen_support(temperature: float, problem: Problem) -> None:
    codes = problem.code(temperature, epsilon=0.0).codes
    wanted = problem.nnls()
    for found, full, target in zip(codes, wanted, problem.targets, strict=True):
        support = np.flatnonzero(found)
        assert full[support].min() > full[np.setdiff1d(np.flatnonzero(full), support)].max(initial=0.0)
        fitted = np.linalg.lstsq(problem.bank[support].T, target, rcond=None)[0]
        np.testing.assert_allclose(found[support], fitted / fitted.sum(), atol=1e-9)


@pytest.mark.parametrize("codes", ["entmax", "sparsemax"])
def test_support_grows_with_temperature_up_to_that_of_nnls(codes: str, problem: Problem) -> None:
    ladder = [0.001, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 10.0, 1000.0]
    sizes = [supports(problem.code(t, codes=codes, epsilon=0.0).codes) for t in ladder]
    means = [size.mean() for size in sizes]
    assert means[0] < 2
    assert means == sorted(means)
    assert means[6] > means[2] + 5
    for size in sizes[6:]:
        np.testing.assert_array_equal(size, supports(problem.nnls()))


@pytest.mark.parametrize("start", [1e-3, 0.02, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("codes", ["entmax", "sparsemax"])
@pytest.mark.parametrize("target", [4, 9])
def test_temperature_control_converges_from_both_sides(target: int, codes: str, start: float) -> None:
    problem, temperature = Problem(1), start
    medians = []
    for _ in range(40):
        medians.append(float(np.median(supports(problem.code(temperature, codes=codes).codes))))
        temperature = update_temperature(temperature, medians[-1], target, rate=0.5)
    assert (medians[0] < target) if start < 0.1 else (medians[0] > target)
    assert all(abs(median - target) <= 1 for median in medians[-10:]), medians


@given(
    temperature=st.floats(*TEMPERATURE_BOUNDS),
    support=st.floats(1, 1e6),
    target=st.integers(1, 1 << 20),
    rate=st.floats(0, 10),
)
def test_temperature_moves_against_the_support(temperature: float, support: float, target: int, rate: float) -> None:
    moved = update_temperature(temperature, support, target, rate)
    assert TEMPERATURE_BOUNDS[0] <= moved <= TEMPERATURE_BOUNDS[1]
    assert (moved - temperature) * (support - target) <= 0
    if TEMPERATURE_BOUNDS[0] < moved < TEMPERATURE_BOUNDS[1]:
        assert np.log(moved / temperature) == pytest.approx(-rate * (support / target - 1), rel=1e-6, abs=1e-12)


@given(
    hnp.arrays(np.float64, (3, 7), elements=st.floats(0, 1, width=16)).filter(lambda a: (a.max(1) > 0).all()),
    st.floats(0, 0.5),
)
def test_prune_drops_exactly_the_small_codes(codes: Array, epsilon: float) -> None:
    pruned = prune(codes, epsilon)
    small = (codes < epsilon * codes.sum(1, keepdims=True)) & (codes < codes.max(1, keepdims=True))
    np.testing.assert_array_equal(pruned, np.where(small, 0, codes))
    assert (supports(pruned) >= 1).all()


@pytest.mark.parametrize("codes", ["nnls", "entmax", "sparsemax", "simplex"])
def test_no_expert_is_left_without_an_atom(codes: str) -> None:
    targets = np.array([[-0.1, -1.0, -0.2], [0.0, 0.0, 0.0]])
    coding = coding_step(np.eye(3), targets, Settings(codes=codes), 1.0)  # type: ignore[arg-type]
    assert (supports(coding.codes) >= 1).all()
    assert coding.codes.min() >= 0
    assert np.isfinite(coding.codes).all()
    if codes != "simplex":  # the left factor turns the sign, so the most opposed atom is the best one
        np.testing.assert_array_equal(np.flatnonzero(coding.codes[0]), [1])


@pytest.mark.parametrize("codes", ["nnls", "entmax", "sparsemax", "simplex"])
def test_irregular_problems_are_counted(codes: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = kernels.nnls

    def some_fail(gram: Array, correlations: Array, **options: bool) -> kernels.NnlsResult:
        solved = solve(gram, correlations, **options)
        status = np.resize([NnlsStatus.OPTIMAL, NnlsStatus.SINGULAR, NnlsStatus.NOT_CONVERGED], len(solved.status))
        return dataclasses.replace(solved, status=status.astype(np.int8))

    assert problem.code(codes=codes).irregular == 0
    monkeypatch.setattr(kernels, "nnls", some_fail)
    assert problem.code(codes=codes).irregular == 2 * EXPERTS // 3
