"""Dense fp64 algebra for Gauss-Newton steps: vectors as arrays, points, and the matrix itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dense import ATOMS, CASES, EXPERTS, RANK, WHOLE, D, dense_of, problem_of, random_point
from families import Array, silent
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.passes import engine
from globe.fit.gauss_newton import Operator
from globe.fit.objective import Value
from globe.fit.point import Point, Vector
from globe.fit.problem import Problem
from globe.statistics.metric import Metric

every_case = pytest.mark.parametrize(("kind", "rank"), CASES)
every_sign = pytest.mark.parametrize("signed", [True, False], ids=["signed", "non-negative"])
some_cases = pytest.mark.parametrize(
    ("kind", "rank", "signed"),
    [
        ("none", RANK, True),
        ("none", RANK, False),
        ("scaled", RANK, False),
        ("scaled", WHOLE, True),
        ("rows", WHOLE, False),
    ],
)


def flat(vector: Vector) -> Array:
    """fp64, the bank first."""
    return np.concatenate([vector.bank.double().numpy().ravel(), vector.codes.ravel()])


def vector_of(values: Array, rank: int) -> Vector:
    size = ATOMS * rank * D
    bank = torch.from_numpy(values[:size].astype(np.float32)).view(ATOMS, rank, D)
    return Vector(bank, values[size:].reshape(EXPERTS, ATOMS).copy())


def drawn(seed: int, rank: int) -> Array:
    """As fp32 has it."""
    size = ATOMS * rank * D + EXPERTS * ATOMS
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32).astype(np.float64)


def sparse_point(rank: int, signed: bool) -> Point:
    """A point; where codes are non-negative some are zero."""
    bank, codes = random_point(signed=signed, rank=rank)
    if not signed:
        codes[np.random.default_rng(0).random(codes.shape) < 0.3] = 0
        codes[:, 0] += 0.1
    return Point(bank, codes, signed)


def problem_at(family: Family, metric: Metric | None, point: Point, *, experts: int = 4) -> tuple[Problem, Value]:
    """The problem after a pass at the point, and what it found."""
    problem = problem_of(family, metric, shape=tuple(point.bank.shape), blocks=Blocks(experts=experts))  # type: ignore[arg-type]
    return problem, problem.look(point.bank, point.codes, 0, silent)


def by_codes(family: Family, metric: Metric | None, point: Point) -> Array:
    """2 JᵀJ / Σ_i ‖W'_i‖², J by the bank and the codes themselves."""
    dense = dense_of(family, metric)
    both = torch.cat(dense.jacobian(point.bank.double(), torch.from_numpy(point.codes)), 1)
    found: Array = (2 * both.mT @ both / dense.energy).numpy()
    return found


def by_variables(family: Family, metric: Metric | None, point: Point) -> Array:
    """The same by the bank and the codes' variables."""
    chain = np.concatenate([np.ones(point.bank.numel()), point.chain.ravel()])
    return by_codes(family, metric, point) * np.outer(chain, chain)


def apply(problem: Problem, point: Point, value: Value, values: Array) -> Array:
    with engine(problem.device) as workers:
        return flat(Operator(problem, point, value.scale, workers)(vector_of(values, point.bank.shape[1])))


def close(found: Array, wanted: Array, tolerance: float) -> None:
    distance = np.linalg.norm(found - wanted)
    assert distance <= tolerance * np.linalg.norm(wanted), distance


def dense_preconditioner(value: Value, codes: Array, chain: Array, weighed: bool) -> tuple[Array, list[Array]]:
    """S (R ⊗ I) Sᵀ ⊗ K of the bank (m r d, m r d), and the blocks of the codes on their support."""
    lefts = value.lefts.double().numpy()
    atoms, rank, _ = lefts.shape
    lefts = lefts + 1e-4 * np.trace(lefts, axis1=1, axis2=2)[:, None, None] / rank * np.eye(rank)
    roots = np.linalg.cholesky(lefts)
    coupling = codes.T @ (value.weights[:, None] * codes)
    coupling /= np.sqrt(np.outer(np.diag(coupling), np.diag(coupling)))
    coupling += 1e-2 * np.eye(atoms)
    whole = np.einsum("jab,jk,kcb->jakc", roots, coupling, roots).reshape(atoms * rank, atoms * rank)
    columns = value.columns.numpy() + 1e-3 * np.eye(len(value.columns)) if weighed else np.eye(len(value.columns))
    blocks = []
    for block, slopes in zip(value.curvature.double().numpy(), chain, strict=True):
        some = np.flatnonzero(slopes)
        inner = block[np.ix_(some, some)] * np.outer(slopes[some], slopes[some])
        blocks.append(inner + 1e-2 * np.trace(inner) / max(len(some), 1) * np.eye(len(some)))
    return np.kron(whole, columns), blocks


def dense_inverse(value: Value, point: Point, weighed: bool) -> Array:
    """The inverse of both parts together; zero where a code has no variable."""
    bank, blocks = dense_preconditioner(value, point.codes, point.chain, weighed)
    size = len(bank) + EXPERTS * ATOMS
    inverse = np.zeros((size, size))
    inverse[: len(bank), : len(bank)] = np.linalg.inv(bank)
    for number, block in enumerate(blocks):
        some = len(bank) + ATOMS * number + np.flatnonzero(point.chain[number])
        inverse[np.ix_(some, some)] = np.linalg.inv(block)
    return inverse
