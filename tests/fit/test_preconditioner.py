"""The preconditioner of Gauss-Newton steps, against dense fp64 algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dense import EXPERTS, WHOLE, D, random_metric
from families import CPU
from forms import Serial
from globe.checkpoint.family import Family
from globe.compute.passes import engine
from globe.fit import preconditioner as preconditioner_module
from globe.fit.gauss_newton import Operator
from globe.fit.objective import Value
from globe.fit.point import Point, Vector
from globe.fit.preconditioner import Preconditioner
from newton import (
    close,
    dense_preconditioner,
    drawn,
    every_case,
    every_sign,
    flat,
    problem_at,
    sparse_point,
    vector_of,
)


@every_case
@every_sign
def test_the_preconditioner_is_the_inverse_of_its_blocks(signed: bool, kind: str, rank: int, family: Family) -> None:
    metric, point = random_metric(kind), sparse_point(rank, signed)
    value = problem_at(family, metric, point)[1]
    matrix, blocks = dense_preconditioner(value, point.codes, point.chain, metric is not None)
    found = Preconditioner(value, point, metric is not None, Serial())
    given = vector_of(drawn(3, rank), rank)
    bank = found.bank(given.bank)
    close(matrix @ bank.double().numpy().ravel(), given.bank.double().numpy().ravel(), 1e-2)
    codes = found.codes(given.codes)
    for number, block in enumerate(blocks):
        some = np.flatnonzero(point.chain[number])
        np.testing.assert_allclose(block @ codes[number, some], given.codes[number, some], rtol=1e-6, atol=1e-8)
        assert np.count_nonzero(codes[number]) == len(some)


@every_case
def test_the_preconditioner_is_symmetric_and_positive_definite(kind: str, rank: int, family: Family) -> None:
    metric, point = random_metric(kind), sparse_point(rank, False)
    value = problem_at(family, metric, point)[1]
    found = Preconditioner(value, point, metric is not None, Serial())
    size = point.bank.numel()
    columns = []
    for unit in np.eye(len(drawn(0, rank))):
        part = vector_of(unit, rank)
        columns.append(flat(Vector(found.bank(part.bank), found.codes(part.codes))))
    matrix = np.stack(columns)
    close(matrix, matrix.T, 1e-5)
    active = np.concatenate([np.ones(size, bool), point.chain.ravel() > 0])
    assert not matrix[~active].any() and not matrix[:size, size:].any()
    assert np.linalg.eigvalsh((matrix + matrix.T)[np.ix_(active, active)])[0] > 0


@pytest.mark.parametrize("kind", ["none", "shared"])
def test_it_is_exact_where_experts_are_alike(kind: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """All C_i and K_i equal: but for damping the bank's part is the inverse of that of the operator."""
    for name in ("_LEFT_DAMPING", "_COUPLING_DAMPING", "_COLUMN_DAMPING"):
        monkeypatch.setattr(preconditioner_module, name, 0.0)
    metric, point = random_metric(kind), sparse_point(WHOLE, False)
    problem, value = problem_at(family, metric, point)
    random = np.random.default_rng(6)
    left, moment = (
        torch.from_numpy(root @ root.T / len(root) + 0.3 * np.eye(len(root))).float()
        for root in (random.standard_normal((WHOLE, WHOLE)), random.standard_normal((D, D)))
    )
    problem.lefts.put(slice(0, EXPERTS), left.expand(EXPERTS, -1, -1))
    if metric is None:  # a basis of nothing: K_i = I
        moment = torch.eye(D)
        problem.hidden.put(slice(0, EXPERTS), torch.zeros(EXPERTS, WHOLE, D))
    else:
        problem.hidden.put(slice(0, EXPERTS), moment.expand(EXPERTS, -1, -1))
    mean = float(moment.diagonal().mean())
    sizes = torch.from_numpy(np.square(point.codes).sum(0)).float()
    alike = Value(
        value.error,
        value.bank,
        value.codes,
        value.errors,
        0,
        value.scale,
        2 * value.scale * mean * sizes[:, None, None] * left,
        np.full(EXPERTS, mean * float(left.trace())),
        (moment / mean).double(),
        value.curvature,
        value.gram,
    )
    precondition = Preconditioner(alike, point, metric is not None, Serial())
    direction = vector_of(drawn(8, WHOLE), WHOLE)
    direction.codes[:] = 0
    with engine(CPU) as workers:
        image = Operator(problem, point, value.scale, workers)(direction)
    close(precondition.bank(image.bank).numpy(), direction.bank.numpy(), 1e-2)


def test_the_preconditioner_passes_over_what_has_no_curvature() -> None:
    lefts, inner = torch.eye(2).repeat(3, 1, 1), torch.eye(3).repeat(2, 1, 1)
    lefts[1] = 0
    inner[0] = 0
    semidefinite = torch.diag(torch.tensor([1.0, 1.0, 0.0, -1e-12], dtype=torch.float64))
    nothing = torch.zeros(3, 2, 4)
    gram = torch.eye(2, dtype=torch.float64)
    codes = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    value = Value(0.0, nothing, np.zeros((2, 3)), np.zeros(2), 0, 1.0, lefts, np.ones(2), semidefinite, inner, gram)
    found = Preconditioner(value, Point(nothing, codes, True), True, Serial())
    given = Vector(torch.ones(3, 2, 4), np.ones((2, 3)))
    moved = Vector(found.bank(given.bank), found.codes(given.codes))
    assert bool(moved.bank.isfinite().all()) and np.isfinite(moved.codes).all()
    assert (moved.codes[0] == 0).all() and (moved.codes[1] > 0).all()
    assert moved.dot(given) > 0
