"""The alternating loop in a metric against NumPy in fp64: sweeps, the dictionary step, planted banks, MPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dense import dense_own
from fake_mps import MPS, FakeMps
from families import Array, make_family, make_job, make_pool, make_rows, planted, random_state, silent
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.codes import initial_codes
from globe.fit.dictionary import Equations, Solving, mod_exact
from globe.fit.dictionary_metric import mod_metric
from globe.fit.progress import States
from globe.fit.sums import State
from globe.fit.sweep import measure, sweep
from globe.fit.training import train
from globe.runs.store import RunStore
from globe.settings import Settings
from globe.statistics.metric import Metric
from globe.statistics.own_columns import OwnColumns

EXPERTS, ROWS, WIDTH, RANK, ATOMS = 14, 64, 20, 6, 5


def make_metric(seed: int, *, full: bool = False, kind: str = "shared", plain: bool = False) -> Metric:
    """Random D_i and L of two layers, experts ``scaled`` or with ``own`` directions; `plain`: ones and identities."""
    rng = np.random.default_rng(seed)

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32))

    layers = tuple(2 * number // EXPERTS for number in range(EXPERTS))
    if plain:
        rows = tuple(torch.ones(ROWS) for _ in layers)
        return Metric(rows, {0: torch.eye(WIDTH), 1: torch.eye(WIDTH)}, None, layers)
    noise = 0.05 * rng.standard_normal((EXPERTS, ROWS, ROWS))
    rows = tuple(tensor(np.eye(ROWS) + some if full else rng.uniform(0.5, 2, ROWS)) for some in noise)
    columns = {0: tensor(np.tril(np.eye(WIDTH) + 0.3 * rng.standard_normal((WIDTH, WIDTH))))}
    columns[1] = tensor(np.diag(rng.uniform(0.3, 3, WIDTH)) + 0.2 * rng.standard_normal((WIDTH, WIDTH)))
    scales = tuple(tensor(rng.uniform(0.5, 2, WIDTH)) for _ in layers) if kind == "scaled" else None
    own = None
    if kind == "own":
        directions = tensor(np.linalg.qr(rng.standard_normal((EXPERTS, WIDTH, 4)))[0])
        own = OwnColumns(directions, tensor(rng.uniform(-0.8, 4, (EXPERTS, 4))))
    return Metric(rows, columns, scales, layers, own=own)


def dense(metric: Metric) -> tuple[Array, Array, Array]:
    """D_i (N, p, p), L_i (N, d, d), and the layer's L without scales."""
    rows = np.stack([(torch.diag(some) if some.ndim == 1 else some).double().numpy() for some in metric.rows])
    common = np.stack([metric.columns[layer].double().numpy() for layer in metric.layers if layer is not None])
    if metric.own is not None:
        own = np.stack([dense_own(metric.own, number).numpy() for number in range(EXPERTS)])
        return rows, common @ own, common
    if metric.scales is None:
        return rows, common, common
    return rows, np.stack([some.double().numpy() for some in metric.scales])[:, :, None] * common, common


@pytest.fixture(scope="module")
def weights() -> Array:
    made = planted(0, experts=EXPERTS, p=ROWS, d=WIDTH, rank=RANK, atoms=ATOMS, uses=3, noise=0.5)
    return made.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def family(weights: Array, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("metric"), weights)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)


def settings_for(mod: str = "exact", **more: Any) -> Settings:
    return Settings(**{"mod": mod, "codes": "nnls", "epsilon": 0.0, "precision": "fp32", **more})


def close(found: Array, wanted: Array, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("mod", ["exact", "aligned"])
@pytest.mark.parametrize(("full", "kind"), [(False, "shared"), (False, "scaled"), (False, "own"), (True, "shared")])
@pytest.mark.parametrize("experts", [3, 100])
def test_a_sweep_is_what_numpy_finds(
    experts: int, full: bool, kind: str, mod: str, weights: Array, family: Family, state: State
) -> None:
    metric = make_metric(2, full=full, kind=kind)
    settings = settings_for(mod, validation_share=0.0 if full else 0.1)
    rows = make_rows(family, RANK, settings)
    found, sums = sweep(
        make_pool(family, rows, metric), state, make_job(settings, blocks=Blocks(experts=experts)), silent
    )
    assert (
        measure(make_pool(family, rows, metric), state, make_job(settings), silent).relative_error
        == found.relative_error
    )
    d_i, l_i, common = dense(metric)
    bank = state.bank.double().numpy()
    whole, mixed = d_i @ weights @ l_i, np.einsum("ij,jrd->ird", state.codes, bank)
    lefts = whole @ np.linalg.pinv(mixed @ l_i)
    errors, energies = ((whole - lefts @ mixed @ l_i) ** 2).sum(2), (whole**2).sum(2)
    assert found.relative_error == pytest.approx(errors.sum() / energies.sum(), rel=1e-4)
    assert found.train_error == pytest.approx(errors[:, rows.train].sum() / energies[:, rows.train].sum(), rel=1e-4)
    if not full:
        held = errors[:, rows.validation].sum() / energies[:, rows.validation].sum()
        assert found.validation_error == pytest.approx(held, rel=1e-4)
    trained = lefts[:, rows.train]
    targets = np.linalg.pinv(trained) @ (d_i @ weights)[:, rows.train]
    wanted = np.concatenate(
        [
            initial_codes(
                np.einsum("jrd,krd->jk", bank @ factor, bank @ factor),
                np.einsum("rd,jrd->j", target @ factor, bank @ factor)[None],
                "nnls",
            )
            for target, factor in zip(targets, common, strict=True)
        ]
    )
    close(sums.codes, wanted)
    if mod == "exact":
        left_grams = trained.transpose(0, 2, 1) @ trained
        residual = trained.transpose(0, 2, 1) @ (d_i @ weights)[:, rows.train]
        residual -= left_grams @ np.einsum("ij,jrd->ird", wanted, bank)
        summand = residual @ l_i @ l_i.transpose(0, 2, 1)
        assert sums.left_grams is not None
        close(sums.left_grams.double().numpy(), left_grams)
    else:
        summand = targets
    close(sums.right_side.double().numpy(), np.einsum("ij,ird->jrd", wanted, summand))


@pytest.mark.parametrize("mod", ["exact", "aligned", "fixed"])
def test_identities_are_no_metric(mod: str, family: Family, state: State) -> None:
    settings = settings_for(mod, outer_loops=4, patience=1000)
    rows = make_rows(family, RANK, settings)
    without = train(make_pool(family, rows), state, make_job(settings), silent)
    start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)
    within = train(make_pool(family, rows, make_metric(0, plain=True)), start, make_job(settings), silent)
    for one, other in zip(without.history, within.history, strict=True):
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-3)


def step_problem(seed: int, metric: Metric) -> tuple[Array, Array, Array, Array, Array]:
    """Codes, C_i, the right side, a bank, and M_i."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.2, 1, (EXPERTS, ATOMS)) * (rng.random((EXPERTS, ATOMS)).argsort(1) < 3)
    lefts = rng.standard_normal((EXPERTS, 9, RANK))
    _, l_i, _ = dense(metric)
    moments = l_i @ l_i.transpose(0, 2, 1)
    bank = rng.standard_normal((ATOMS, RANK, WIDTH))
    right = np.einsum("ij,ipr,ipd,ide->jre", codes, lefts, rng.standard_normal((EXPERTS, 9, WIDTH)), moments)
    return codes, lefts.transpose(0, 2, 1) @ lefts, right, bank, moments


def solve(metric: Metric, problem: tuple[Array, ...], ridge: float, steps: int, **more: Any) -> Array:
    codes, left_grams, right, bank, moments = problem
    fitted = np.einsum("ij,irs,isd,ide->jre", codes, left_grams, np.einsum("ij,jrd->ird", codes, bank), moments)
    normal, residual, start = (torch.from_numpy(a.astype(np.float32)) for a in (left_grams, right - fitted, bank))
    how = Solving(ridge, steps, more.get("over_relaxation", 0.0))
    equations = Equations(codes, normal, residual)
    return mod_metric(equations, start, metric, how, more.get("blocks", Blocks())).double().numpy()


def dense_solution(problem: tuple[Array, ...], ridge: float) -> Array:
    """Solve all m·r·d normal equations at once."""
    codes, left_grams, right, bank, moments = problem
    matrix = np.einsum("ij,ik,irs,ide->jrdkse", codes, codes, left_grams, moments, optimize=True).reshape(bank.size, -1)
    means = np.einsum("idd->i", moments) / WIDTH
    shift = ridge * np.einsum("ij,irr->j", codes**2 * means[:, None], left_grams) / RANK
    matrix += np.diag(np.repeat(shift, RANK * WIDTH))
    return np.linalg.solve(matrix, right.ravel()).reshape(bank.shape)


@pytest.mark.parametrize("kind", ["shared", "scaled", "own"])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_the_dictionary_step_is_the_dense_solve(ridge: float, kind: str) -> None:
    metric = make_metric(3, kind=kind)
    problem = step_problem(4, metric)
    wanted = dense_solution(problem, ridge)
    found = solve(metric, problem, ridge, 2000, blocks=Blocks(experts=4))
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_over_relaxation_goes_past_the_solution_and_unused_atoms_stay() -> None:
    metric = make_metric(3)
    codes, *rest = step_problem(5, metric)
    codes[:, 2] = 0
    problem = (codes, *rest)
    bank = problem[3]
    once, past = (solve(metric, problem, 1e-3, 5, over_relaxation=amount) for amount in (0.0, 0.5))
    close(past - bank, 1.5 * (once - bank), 1e-5)
    np.testing.assert_array_equal(once[2], bank[2].astype(np.float32))


def test_without_columns_the_step_is_the_plain_one() -> None:
    plain = make_metric(0, plain=True)
    codes, left_grams, right, bank, _ = step_problem(6, plain)
    tensors = [torch.from_numpy(a.astype(np.float32)) for a in (left_grams, right, bank)]
    down = Metric(plain.rows, {}, None, (None,) * EXPERTS)
    first, second = (Equations(codes, tensors[0], tensors[1].clone()) for _ in range(2))
    found = mod_metric(first, tensors[2], down, Solving(1e-4, 8))
    assert torch.equal(found, mod_exact(second, tensors[2], Solving(1e-4, 8)))


@pytest.mark.parametrize("kind", ["shared", "scaled", "own"])
def test_a_planted_bank_is_found_again_from_nearby(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    planted_state = random_state(6, experts=EXPERTS, atoms=3, rank=4, d=WIDTH)
    mixtures = np.einsum("ij,jrd->ird", planted_state.codes, planted_state.bank.double())
    family = make_family(tmp_path, rng.standard_normal((EXPERTS, ROWS, 4)) @ mixtures)
    settings = Settings(codes="nnls", outer_loops=30, patience=1000, precision="fp32")
    bank = planted_state.bank + 0.01 * torch.from_numpy(rng.standard_normal((3, 4, WIDTH)).astype(np.float32))
    start = State(bank, rng.uniform(0.1, 1, (EXPERTS, 3)), 1.0)
    metric = make_metric(7, kind=kind)
    found = train(make_pool(family, make_rows(family, 4, settings), metric), start, make_job(settings), silent)
    assert found.initial is not None and found.measure is not None
    assert found.measure.relative_error < 1e-3 * found.initial.relative_error
    assert found.measure.relative_error < 2e-4


@pytest.mark.parametrize("mod", ["exact", "aligned"])
def test_rows_that_mix_are_not_held_out(mod: str, family: Family, state: State) -> None:
    settings = settings_for(mod, outer_loops=2)
    rows = make_rows(family, RANK, settings)
    assert len(rows.validation) > 0
    start = State(state.bank.clone(), state.codes, 1.0)
    found = train(make_pool(family, rows, make_metric(8, full=True)), start, make_job(settings), silent)
    assert all(record.validation_error is None for record in found.history)
    assert found.history[-1].relative_error < found.initial.relative_error  # type: ignore[union-attr]


@pytest.mark.parametrize("mod", ["exact", "aligned"])
def test_threads_change_no_bit(mod: str, family: Family) -> None:
    settings = settings_for(mod, outer_loops=2)
    rows, metric, before = make_rows(family, RANK, settings), make_metric(9, kind="scaled"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)
            found.append(train(make_pool(family, rows, metric), start, make_job(settings), silent))
    finally:
        torch.set_num_threads(before)
    assert [record.relative_error for record in found[0].history] == [
        record.relative_error for record in found[1].history
    ]
    assert torch.equal(found[0].state.bank, found[1].state.bank)


@pytest.mark.parametrize("kind", ["shared", "scaled", "own"])
@pytest.mark.parametrize("mod", ["exact", "aligned"])
def test_mps_has_all_that_the_metric_takes(mod: str, kind: str, family: Family, tmp_path: Path) -> None:
    settings = settings_for(mod, outer_loops=2, coherence=0.1, duplicate=0.0)
    rows, metric = make_rows(family, RANK, settings), make_metric(10, kind=kind)
    start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)
    here = train(
        make_pool(family, rows, metric), State(start.bank.clone(), start.codes, 1.0), make_job(settings), silent
    )
    with FakeMps() as seen:
        there = Metric(
            tuple(some.to(MPS) for some in metric.rows),
            {layer: factor.to(MPS) for layer, factor in metric.columns.items()},
            tuple(some.to(MPS) for some in metric.scales) if metric.scales is not None else None,
            metric.layers,
            own=OwnColumns(metric.own.directions.to(MPS), metric.own.values.to(MPS)) if metric.own else None,
        )
        on_device = State(start.bank.to(MPS), start.codes, 1.0)
        states = States(RunStore(tmp_path / "store", {}, {}, lambda line: None), "gate", MPS)
        found = train(make_pool(family, rows, there), on_device, make_job(settings), silent, states=states)
    assert "mm" in seen.seen
    assert [record.reseeded for record in found.history] == [record.reseeded for record in here.history]
    for one, other in zip(here.history, found.history, strict=True):
        assert other.relative_error == pytest.approx(one.relative_error, rel=0.02)
