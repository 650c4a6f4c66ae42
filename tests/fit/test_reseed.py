"""Guards of the bank: coherence falls for every weight, and idle atoms come back to life."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import make_family, make_job, make_pool, make_rows, planted, random_state, silent
from globe.checkpoint.family import Family
from globe.compute.gemm import bank_gram
from globe.fit import training
from globe.fit.dictionary import unit_atoms
from globe.fit.reseed import decorrelate, reseed
from globe.fit.sums import State
from globe.fit.sweep import measure
from globe.fit.training import train
from globe.settings import Settings

EXPERTS, ROWS, WIDTH, RANK, ATOMS = 16, 40, 24, 4, 6


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    weights = planted(0, experts=EXPERTS, p=ROWS, d=WIDTH, rank=RANK, atoms=ATOMS, uses=3, noise=0.2)
    return make_family(tmp_path_factory.mktemp("reseed"), weights)


def make_state(seed: int = 1) -> State:
    return random_state(seed, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)


def deviation(bank: torch.Tensor) -> float:
    return float(np.linalg.norm(bank_gram(bank) - np.eye(len(bank))))


@given(seed=st.integers(0, 50), weight=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e6]), shared=st.floats(0, 3))
def test_every_weight_lowers_the_coherence(seed: int, weight: float, shared: float) -> None:
    bank = make_state(seed).bank
    bank = unit_atoms(bank + shared * bank[0], np.ones((1, ATOMS)))[0]
    before = deviation(bank)
    found = unit_atoms(decorrelate(bank.clone(), weight), np.ones((1, ATOMS)))[0]
    assert deviation(found) < before
    if weight == 1e6:
        assert deviation(found) < 1e-3


def test_the_penalty_is_the_proximal_step() -> None:
    bank = make_state(3).bank
    flat = bank.double().numpy().reshape(ATOMS, -1)
    left, _, right = np.linalg.svd(flat, full_matrices=False)
    wanted = (flat + 0.7 * left @ right) / 1.7
    np.testing.assert_allclose(decorrelate(bank, 0.7).numpy().reshape(ATOMS, -1), wanted, atol=1e-6)


def test_loops_with_the_penalty_end_less_coherent(family: Family) -> None:
    found = []
    for weight in (0.0, 1.0):
        settings = Settings(codes="nnls", coherence=weight, outer_loops=4, patience=100)
        found.append(
            train(make_pool(family, make_rows(family, RANK, settings)), make_state(), make_job(settings), silent)
        )
    assert deviation(found[1].state.bank) < deviation(found[0].state.bank)


@pytest.mark.parametrize("codes", ["nnls", "entmax", "signed"])
def test_dead_and_duplicate_atoms_come_back_to_life(codes: str, family: Family) -> None:
    settings = Settings(codes=codes)  # type: ignore[arg-type]
    rows, state = make_rows(family, RANK, settings), make_state()
    state.codes[:, 4] = 0
    state.bank[5] = -state.bank[2] if codes == "signed" else state.bank[2]
    before = measure(make_pool(family, rows), state, make_job(settings), silent)
    found, count = reseed(
        make_pool(family, rows), State(state.bank.clone(), state.codes, 1.0), before.expert_errors, settings
    )
    assert count == 2
    worst = np.argsort(-before.expert_errors)[:2]
    for atom, expert in zip((4, 5), worst, strict=True):
        assert np.flatnonzero(found.codes[:, atom]).tolist() == [expert]
    np.testing.assert_allclose(found.bank.flatten(1).norm(dim=1), 1, rtol=1e-5)
    assert np.abs(bank_gram(found.bank) - np.eye(ATOMS)).max() < 0.9
    after = measure(make_pool(family, rows), found, make_job(settings), silent)
    np.testing.assert_allclose(np.delete(after.expert_errors, worst), np.delete(before.expert_errors, worst), rtol=1e-3)
    assert (after.expert_errors[worst] < before.expert_errors[worst]).all()


def test_opposite_atoms_both_serve_non_negative_codes(family: Family) -> None:
    settings = Settings(codes="nnls")
    rows, state = make_rows(family, RANK, settings), make_state()
    state.bank[5] = -state.bank[2]
    assert reseed(make_pool(family, rows), state, np.ones(EXPERTS), settings)[1] == 0


def test_what_fits_exactly_gives_no_atom(family: Family) -> None:
    settings = Settings(codes="nnls")
    state = make_state()
    state.codes[:, 4] = 0
    found, count = reseed(make_pool(family, make_rows(family, RANK, settings)), state, np.zeros(EXPERTS), settings)
    assert count == 0 and torch.equal(found.bank, state.bank)


def run(family: Family, state: State, **more: Any) -> tuple[Any, list[str]]:
    settings = Settings(**{"codes": "nnls", "outer_loops": 4, "patience": 100, **more})
    lines: list[str] = []
    return train(
        make_pool(family, make_rows(family, RANK, settings)), state, make_job(settings, lines=lines), silent
    ), lines


def test_loops_re_seed_say_so_and_never_in_the_last(family: Family) -> None:
    state = make_state()
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        original = training.reseed

        def spy(*arguments: Any) -> Any:
            found = original(*arguments)
            calls.append(found[1])
            return found

        patch.setattr(training, "reseed", spy)
        found, lines = run(family, state, duplicate=0.0)  # any two atoms that point the same way
    assert len(calls) == 3  # not after the last coding
    assert [record.reseeded for record in found.history] == [*calls, 0]
    assert sum(calls) >= 1
    assert sum("were re-seeded" in line for line in lines) == sum(count > 0 for count in calls)
    errors = [found.initial.relative_error, *(record.relative_error for record in found.history)]
    assert found.measure.relative_error == min(errors)
