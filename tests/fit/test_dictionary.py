"""The dictionary steps against dense solves of their normal equations in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from families import Array
from globe.compute.blocks import Blocks
from globe.fit.dictionary import Equations, Solving, mod, mod_exact, unit_atoms

EXPERTS, ROWS, RANK, WIDTH, ATOMS = 24, 12, 5, 7, 6


@dataclass(frozen=True)
class Problem:
    """Experts W_i and left factors A_i, with sparse codes, in fp64."""

    weights: Array
    lefts: Array
    codes: Array
    bank: Array

    @property
    def normal(self) -> Array:
        """A_iᵀA_i."""
        return np.einsum("ipr,ips->irs", self.lefts, self.lefts)

    @property
    def right_side(self) -> Array:
        """Σ_i α_ij A_iᵀW_i."""
        return np.einsum("ij,ipr,ipd->jrd", self.codes, self.lefts, self.weights)

    def objective(self, bank: Array, shift: Array) -> float:
        fitted = self.lefts @ np.einsum("ij,jrd->ird", self.codes, bank)
        return float(((self.weights - fitted) ** 2).sum() + (shift * (bank**2).sum((1, 2))).sum())

    def shifts(self, ridge: float) -> Array:
        """λ_j: `ridge` times the mean diagonal of Σ_i α_ij² A_iᵀA_i."""
        return ridge * np.einsum("ij,irr->j", self.codes**2, self.normal) / RANK

    def dense_solution(self, ridge: float) -> Array:
        """Solve all m·r normal equations at once."""
        matrix = np.einsum("ij,ik,irs->jrks", self.codes, self.codes, self.normal).reshape(ATOMS * RANK, -1)
        matrix += np.diag(np.repeat(self.shifts(ridge), RANK))
        return np.linalg.solve(matrix, self.right_side.reshape(ATOMS * RANK, -1)).reshape(self.bank.shape)

    def exact(self, ridge: float, steps: int, dtype: torch.dtype = torch.float32, **more: Any) -> Array:
        mixtures = np.einsum("ij,jrd->ird", self.codes, self.bank)
        residual = self.right_side - np.einsum("ij,irs,isd->jrd", self.codes, self.normal, mixtures)
        normal, vector, bank = (torch.from_numpy(a.astype(np.float32)) for a in (self.normal, residual, self.bank))
        relaxation, blocks = more.get("over_relaxation", 0.0), more.get("blocks", Blocks())
        equations = Equations(self.codes, normal.to(dtype), vector)
        return mod_exact(equations, bank, Solving(ridge, steps, relaxation), blocks).double().numpy()


def make(seed: int, uses: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.2, 1, (EXPERTS, ATOMS)) * (rng.random((EXPERTS, ATOMS)).argsort(1) < uses)
    lefts = rng.standard_normal((EXPERTS, ROWS, RANK)) * rng.uniform(0.5, 2, (EXPERTS, 1, RANK))
    return Problem(rng.standard_normal((EXPERTS, ROWS, WIDTH)), lefts, codes, rng.standard_normal((ATOMS, RANK, WIDTH)))


def relative(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_step_is_the_dense_solve(seed: int, ridge: float) -> None:
    problem = make(seed)
    assert relative(problem.exact(ridge, 200), problem.dense_solution(ridge)) < 2e-5


def test_exact_step_is_the_solution_of_the_whole_least_squares_problem() -> None:
    problem = make(2)
    columns = [np.kron(code, left) for code, left in zip(problem.codes, problem.lefts, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(columns), problem.weights.reshape(-1, WIDTH), rcond=None)[0]
    assert relative(problem.exact(0.0, 200), wanted.reshape(problem.bank.shape)) < 2e-5


def test_every_cg_step_lowers_the_objective() -> None:
    problem = make(3)
    shift = problem.shifts(1e-4)
    values = [problem.objective(problem.bank, shift)]
    values += [problem.objective(problem.exact(1e-4, steps), shift) for steps in range(1, 9)]
    assert values == sorted(values, reverse=True)
    best = problem.objective(problem.dense_solution(1e-4), shift)
    assert values[-1] - best < 1e-3 * (values[0] - best)


@pytest.mark.parametrize("columns", [1, 3, 100])
def test_blocks_of_columns_are_solved_on_their_own(columns: int) -> None:
    problem = make(9)
    found = problem.exact(1e-4, 200, blocks=Blocks(columns=columns))
    assert relative(found, problem.dense_solution(1e-4)) < 2e-5


def test_over_relaxation_goes_past_the_solution() -> None:
    problem = make(10)
    solution = problem.dense_solution(1e-4)
    found = problem.exact(1e-4, 200, over_relaxation=0.5)
    assert relative(found, problem.bank + 1.5 * (solution - problem.bank)) < 2e-5


def test_bf16_products_change_the_step_by_less_than_a_hundredth() -> None:
    problem = make(11)
    step = problem.exact(1e-4, 8) - problem.bank
    assert relative(problem.exact(1e-4, 8, torch.bfloat16) - problem.bank, step) < 1e-2


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_one_step_is_enough_where_no_expert_mixes_atoms(ridge: float) -> None:
    problem = make(4, uses=1)  # the operator is then the preconditioner
    assert relative(problem.exact(ridge, 1), problem.dense_solution(ridge)) < 1e-5


def test_a_solution_stays_and_more_steps_do_no_harm() -> None:
    problem = make(5)
    solved = Problem(problem.weights, problem.lefts, problem.codes, problem.dense_solution(1e-4))
    for steps in (1, 500):
        assert relative(solved.exact(1e-4, steps), solved.bank) < 1e-5


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_exact_step_leaves_unused_atoms_in_place(ridge: float) -> None:
    problem = make(6)
    problem.codes[:, 2] = 0
    problem.codes[problem.codes.max(1) == 0, 0] = 1
    found = problem.exact(ridge, 200)
    np.testing.assert_array_equal(found[2], problem.bank[2].astype(np.float32))
    used = [0, 1, 3, 4, 5]
    columns = [np.kron(code, left) for code, left in zip(problem.codes[:, used], problem.lefts, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(columns), problem.weights.reshape(-1, WIDTH), rcond=None)[0]
    assert relative(found[used], wanted.reshape(5, RANK, WIDTH)) < 1e-3


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
def test_mod_is_ridge_regression(ridge: float) -> None:
    rng = np.random.default_rng(7)
    codes = rng.uniform(0, 1, (EXPERTS, ATOMS)) * (rng.random((EXPERTS, ATOMS)) < 0.6)
    targets = rng.standard_normal((EXPERTS, RANK * WIDTH))
    penalty = np.sqrt(ridge * np.diag(codes.T @ codes).mean()) * np.eye(ATOMS)
    padded = np.concatenate([targets, np.zeros((ATOMS, RANK * WIDTH))])
    wanted = np.linalg.lstsq(np.concatenate([codes, penalty]), padded, rcond=None)[0].reshape(ATOMS, RANK, WIDTH)
    right_side = torch.from_numpy((codes.T @ targets).astype(np.float32)).view(ATOMS, RANK, WIDTH)
    found = mod(codes, right_side, torch.zeros(ATOMS, RANK, WIDTH), ridge)
    assert relative(found.double().numpy(), wanted) < 1e-5


def test_mod_leaves_unused_atoms_in_place_and_solves_for_the_rest() -> None:
    rng = np.random.default_rng(8)
    codes = rng.uniform(0, 1, (EXPERTS, ATOMS))
    codes[:, [1, 4]] = 0
    used = [0, 2, 3, 5]
    planted, bank = rng.standard_normal((2, ATOMS, RANK, WIDTH)).astype(np.float32)
    right_side = torch.from_numpy(np.einsum("ij,ik,krd->jrd", codes, codes, planted).astype(np.float32))
    found = mod(codes, right_side, torch.from_numpy(bank), 0.0).double().numpy()
    np.testing.assert_array_equal(found[[1, 4]], bank[[1, 4]])
    assert relative(found[used], planted[used]) < 1e-4


@given(
    bank=hnp.arrays(np.float32, (4, 2, 3), elements=st.floats(-8, 8, width=16)),
    codes=hnp.arrays(np.float64, (5, 4), elements=st.floats(0, 4, width=16)),
)
def test_unit_atoms_keep_the_mixtures(bank: np.ndarray, codes: Array) -> None:  # type: ignore[type-arg]
    unit, rescaled = unit_atoms(torch.from_numpy(bank.copy()), codes)
    norms = np.linalg.norm(unit.double().numpy().reshape(4, -1), axis=1)
    zero = ~bank.any((1, 2))
    np.testing.assert_allclose(norms, np.where(zero, 0, 1), rtol=1e-6)
    before = np.einsum("ij,jrd->ird", codes, bank.astype(np.float64))
    after = np.einsum("ij,jrd->ird", rescaled, unit.double().numpy())
    np.testing.assert_allclose(after, before, atol=1e-6 * (1 + np.abs(before).max()))
    assert (rescaled >= 0).all()
