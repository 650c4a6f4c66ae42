"""The alternating loop on small families: what every state satisfies, and how the support is steered."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make_family, make_job, make_pool, make_rows, planted, random_state, seed_task, silent
from globe import kernels
from globe.checkpoint.family import Family
from globe.compute.codes import supports
from globe.fit import training
from globe.fit.codes import entmax_alpha
from globe.fit.dictionary import Equations, Solving, mod_exact
from globe.fit.progress import Progress, States
from globe.fit.sums import State, Sums
from globe.fit.sweep import measure
from globe.fit.training import Training, train
from globe.runs.store import RunStore
from globe.seeds import ts_pca
from globe.seeds.pool import Pool
from globe.settings import Settings

EXPERTS, ROWS, WIDTH, RANK, ATOMS = 40, 32, 28, 10, 16


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    weights = planted(0, experts=EXPERTS, p=ROWS, d=WIDTH, rank=RANK, atoms=ATOMS, noise=0.3)
    return make_family(tmp_path_factory.mktemp("training"), weights)


def run(family: Family, **settings: Any) -> tuple[Training, list[State], list[str]]:
    """Train from TS-PCA seeds; also every state, the last one included, and the lines logged."""
    chosen = Settings(**{"patience": 1000, "support": 5, **settings})
    rows = make_rows(family, RANK, chosen)
    seeds = ts_pca(seed_task(family, rows, ATOMS, init_codes=chosen.init_codes))
    states: list[State] = []
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sweep", "measure"):
            original = getattr(training, name)

            def spy(pool: Pool, state: State, *rest: Any, original: Any = original) -> Any:
                states.append(state)
                return original(pool, state, *rest)

            patch.setattr(training, name, spy)
        state = State(seeds.bank, seeds.codes, chosen.temperature)
        found = train(make_pool(family, rows), state, make_job(chosen, lines=lines), silent)
    return found, states, lines


@pytest.mark.parametrize("codes", ["entmax", "sparsemax", "simplex", "nnls"])
@pytest.mark.parametrize("mod", ["exact", "aligned", "fixed"])
def test_every_state_has_unit_atoms_and_codes_in_their_form(mod: str, codes: str, family: Family) -> None:
    settings = Settings(mod=mod, codes=codes)  # type: ignore[arg-type]
    _, states, _ = run(family, mod=mod, codes=codes, outer_loops=3)
    assert len(states) == 4
    for state in states[1:]:
        np.testing.assert_allclose(state.bank.flatten(1).norm(dim=1), 1, rtol=1e-6)
        assert state.codes.min() >= 0
        assert (supports(state.codes) >= 1).all()
        if codes != "nnls":
            np.testing.assert_allclose(state.codes.sum(1), 1, rtol=1e-12)
            alpha = entmax_alpha(settings)
            logits = kernels.entmax_inverse(state.codes, alpha, temperature=state.temperature)
            again = kernels.entmax(logits, alpha, temperature=state.temperature)
            np.testing.assert_allclose(again, state.codes, atol=1e-9)


@pytest.mark.parametrize("codes", ["simplex", "nnls", "entmax"])
def test_normalising_atoms_and_codes_moves_no_mixture_but_by_a_factor(codes: str, family: Family) -> None:
    settings = Settings(codes=codes, over_relaxation=0.0)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    state = random_state(2, experts=6, atoms=5, rank=3, d=4)
    left_grams = torch.eye(3).expand(6, 3, 3).contiguous()
    coded = rng.uniform(0.1, 1, (6, 5))
    right_side = torch.from_numpy(rng.standard_normal((5, 3, 4)).astype(np.float32))
    found = training._dictionary_step(state, Sums(coded, 0, right_side.clone(), left_grams), settings, 0.0)
    how = Solving(settings.mod_ridge, settings.cg_steps)
    raw = mod_exact(Equations(coded, left_grams, right_side), state.bank, how)
    before = np.einsum("ij,jrd->ird", coded, raw.double()).reshape(6, -1)
    after = np.einsum("ij,jrd->ird", found.codes, found.bank.double()).reshape(6, -1)
    factors = (before * after).sum(1) / (after**2).sum(1)
    np.testing.assert_allclose(after * factors[:, None], before, atol=1e-5 * np.abs(before).max())
    assert (factors > 0).all()
    if codes == "nnls":
        np.testing.assert_allclose(factors, 1, rtol=1e-5)


def directions(bank: torch.Tensor) -> torch.Tensor:
    return bank / bank.flatten(1).norm(dim=1)[:, None, None]


def test_the_dictionary_step_overshoots_by_its_relaxation() -> None:
    state = random_state(2, experts=6, atoms=5, rank=3, d=4)
    rng = np.random.default_rng(1)
    left_grams = torch.eye(3).expand(6, 3, 3).contiguous()
    right_side = torch.from_numpy(rng.standard_normal((5, 3, 4)).astype(np.float32))
    codes, settings = rng.uniform(0.1, 1, (6, 5)), Settings(codes="nnls")
    how = Solving(settings.mod_ridge, 8)
    solved = mod_exact(Equations(codes, left_grams, right_side.clone()), state.bank, how)
    for relaxation in (0.0, 0.6):
        sums = Sums(codes, 0, right_side.clone(), left_grams)
        found = training._dictionary_step(state, sums, settings, relaxation).bank
        wanted = directions(solved + relaxation * (solved - state.bank))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("mod", ["aligned", "fixed"])
def test_mod_fits_the_new_codes_to_the_targets(mod: str) -> None:
    state = random_state(2, experts=20, atoms=5, rank=3, d=4)
    rng = np.random.default_rng(1)
    codes, targets = rng.uniform(0.1, 1, (20, 5)), rng.standard_normal((20, 12))
    right_side = torch.from_numpy((codes.T @ targets).astype(np.float32)).view(5, 3, 4)
    settings = Settings(codes="nnls", mod=mod, mod_ridge=0.0)  # type: ignore[arg-type]
    found = training._dictionary_step(state, Sums(codes, 0, right_side, None), settings, 0.6).bank
    wanted = np.linalg.lstsq(codes, targets, rcond=None)[0].reshape(5, 3, 4)
    np.testing.assert_allclose(found, directions(torch.from_numpy(wanted)), atol=1e-4)


@pytest.mark.parametrize("mod", ["exact", "aligned", "fixed"])
@pytest.mark.parametrize("loops", [0, 1, 5])
def test_the_best_state_is_kept(loops: int, mod: str, family: Family) -> None:
    found, states, _ = run(family, mod=mod, outer_loops=loops)
    errors = [found.initial.relative_error, *(record.relative_error for record in found.history)]
    assert len(states) == len(errors) == loops + 1
    assert found.measure.relative_error == min(errors)
    best = states[int(np.argmin(errors))]
    assert torch.equal(found.state.bank, best.bank) and found.state.temperature == best.temperature
    assert (found.state.codes == best.codes).all()
    settings = Settings()
    again = measure(make_pool(family, make_rows(family, RANK, settings)), found.state, make_job(settings), silent)
    assert again.relative_error == pytest.approx(min(errors), rel=1e-9)


def test_a_planted_bank_is_found_again_from_nearby(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    planted_state = random_state(6, experts=EXPERTS, atoms=3, rank=4, d=WIDTH)
    mixtures = np.einsum("ij,jrd->ird", planted_state.codes, planted_state.bank.double())
    family = make_family(tmp_path, rng.standard_normal((EXPERTS, ROWS, 4)) @ mixtures)
    settings = Settings(codes="nnls", outer_loops=40, patience=1000)
    bank = planted_state.bank + 0.01 * torch.from_numpy(rng.standard_normal((3, 4, WIDTH)).astype(np.float32))
    state = State(bank, rng.uniform(0.1, 1, (EXPERTS, 3)), 1.0)
    found = train(make_pool(family, make_rows(family, 4, settings)), state, make_job(settings), silent)
    assert found.initial.relative_error > 0.1
    assert found.measure.relative_error < 1e-5
    assert found.measure.validation_error < 1e-5


def test_exact_beats_aligned_beats_fixed(family: Family) -> None:
    errors = [run(family, mod=mod, codes="nnls", outer_loops=6)[0] for mod in ("exact", "aligned", "fixed")]
    exact, aligned, fixed = (found.measure.relative_error / found.initial.relative_error for found in errors)
    assert exact < 0.9 * aligned < aligned < 0.9 * fixed


@pytest.mark.parametrize("codes", ["entmax", "sparsemax"])
@pytest.mark.parametrize("start", [0.02, 20.0])
def test_the_support_converges_to_its_target_from_both_sides(start: float, codes: str, tmp_path: Path) -> None:
    weights = planted(0, experts=EXPERTS, p=ROWS, d=WIDTH, rank=RANK, atoms=ATOMS, noise=3.0)
    found, _, _ = run(make_family(tmp_path, weights), codes=codes, temperature=start, support=6, outer_loops=30)
    medians = [record.support_median for record in found.history]
    assert medians[0] < 3 if start < 1 else medians[0] > 8
    assert all(abs(median - 6) <= 2 for median in medians[-10:]), medians
    assert abs(np.mean(medians[-10:]) - 6) <= 1, medians


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_temperature_moves_every_k_loops(every: int, family: Family) -> None:
    found, _, _ = run(family, temperature=0.05, temperature_every=every, outer_loops=7)
    temperatures = [0.05, *(record.temperature for record in found.history)]
    moved = [after != before for before, after in itertools.pairwise(temperatures)]
    assert moved == [loop % every == 0 for loop in range(7)]


def test_progress_counts_every_expert_of_every_pass(family: Family) -> None:
    steps: list[int] = []
    settings = Settings(outer_loops=3, patience=1000)
    rows = make_rows(family, RANK, settings)
    train(
        make_pool(family, rows),
        random_state(3, experts=EXPERTS, atoms=6, rank=RANK, d=WIDTH),
        make_job(settings),
        steps.append,
    )
    assert sum(steps) == 4 * EXPERTS


def test_one_bank_is_in_memory_while_experts_pass(family: Family, tmp_path: Path) -> None:
    settings = Settings(outer_loops=4, patience=1000, mod="aligned", support=5)
    rows = make_rows(family, RANK, settings)
    store = RunStore(tmp_path / "store", {}, {}, lambda line: None)
    states, begin = States(store, "gate"), Progress(settings.over_relaxation)
    states.save(random_state(3, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH), begin)
    alive: list[int] = []

    def banks() -> list[torch.Tensor]:
        gc.collect()
        size = ATOMS * RANK * WIDTH
        return [value for value in gc.get_objects() if type(value) is torch.Tensor and value.numel() == size]

    before = banks()  # of other tests; held, so that no new one has their addresses
    taken = {value.untyped_storage().data_ptr() for value in before}

    def spy(*arguments: Any) -> Any:
        alive.append(len({value.untyped_storage().data_ptr() for value in banks()} - taken))
        return sweep(*arguments)

    sweep = training.sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "sweep", spy)
        train(make_pool(family, rows), begin, make_job(settings), silent, states=states)
    assert alive == [1, 1, 1, 1]
    assert len(store.names()) <= 2
