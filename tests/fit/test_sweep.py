"""One pass over the experts against NumPy in fp64, and held-out rows that must not matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import Array, make_family, make_job, make_pool, make_rows, planted, random_state, seed_task, silent
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.compute.codes import initial_codes
from globe.compute.gemm import bank_gram
from globe.fit import sweep as sweep_module
from globe.fit.codes import coding_step
from globe.fit.sums import State
from globe.fit.sweep import measure, sweep
from globe.fit.training import train
from globe.seeds import ts_pca
from globe.seeds.pool import Pool
from globe.seeds.proxies import Rows
from globe.settings import Settings

EXPERTS, ROWS, WIDTH, RANK, ATOMS = 14, 64, 20, 6, 5
MODS = ["exact", "aligned", "fixed"]


@pytest.fixture(scope="module")
def weights() -> Array:
    made = planted(0, experts=EXPERTS, p=ROWS, d=WIDTH, rank=RANK, atoms=ATOMS, uses=3, noise=0.5)
    return made.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def family(weights: Array, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("sweep"), weights)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=WIDTH)


def settings_for(mod: str, **more: Any) -> Settings:
    return Settings(mod=mod, codes="nnls", epsilon=0.0, **more)  # type: ignore[arg-type]


class Reference:
    """A sweep in fp64: pseudo-inverses, no Grams."""

    def __init__(self, weights: Array, rows: Rows, state: State, mod: str) -> None:
        bank = state.bank.double().numpy()
        mixtures = np.einsum("ij,jrd->ird", state.codes, bank)
        lefts = weights @ np.linalg.pinv(mixtures)
        self.errors = ((weights - lefts @ mixtures) ** 2).sum(2)
        self.energies = (weights**2).sum(2)
        trained = weights[:, rows.train]
        self.left_grams = lefts[:, rows.train].transpose(0, 2, 1) @ lefts[:, rows.train]
        if mod == "fixed":
            targets = weights[:, rows.proxy]
            targets = targets / np.linalg.norm(targets, axis=(1, 2), keepdims=True)
        else:
            targets = np.linalg.pinv(lefts[:, rows.train]) @ trained
        self.codes = initial_codes(bank_gram(state.bank), np.einsum("ird,jrd->ij", targets, bank), "nnls")
        if mod == "exact":
            summand = lefts[:, rows.train].transpose(0, 2, 1) @ trained
            summand -= self.left_grams @ np.einsum("ij,jrd->ird", self.codes, bank)
        else:
            summand = targets
        self.right_side = np.einsum("ij,ird->jrd", self.codes, summand)

    def error(self, rows: Any) -> float:
        return float(self.errors[:, rows].sum() / self.energies[:, rows].sum())


@pytest.mark.parametrize("experts", [1, 3, 100])
@pytest.mark.parametrize("mod", MODS)
def test_a_sweep_is_what_numpy_finds(mod: str, experts: int, weights: Array, family: Family, state: State) -> None:
    settings = settings_for(mod, validation_share=0.1, precision="fp32")
    rows = make_rows(family, RANK, settings)
    wanted = Reference(weights, rows, state, mod)
    steps: list[int] = []
    found, sums = sweep(
        make_pool(family, rows), state, make_job(settings, blocks=Blocks(experts=experts)), steps.append
    )
    assert sum(steps) == EXPERTS
    assert len(rows.validation) == 6
    assert found.relative_error == pytest.approx(wanted.error(slice(None)), rel=1e-5)
    assert found.train_error == pytest.approx(wanted.error(rows.train), rel=1e-5)
    assert found.validation_error == pytest.approx(wanted.error(rows.validation), rel=1e-5)
    np.testing.assert_allclose(found.expert_errors, wanted.errors.sum(1) / wanted.energies.sum(1), rtol=1e-4)
    assert found.ridged == sums.irregular == 0
    np.testing.assert_allclose(sums.codes, wanted.codes, atol=1e-4 * wanted.codes.max())
    right_side = sums.right_side.double().numpy()
    np.testing.assert_allclose(right_side, wanted.right_side, atol=1e-4 * np.abs(wanted.right_side).max())
    if mod == "exact":
        assert sums.left_grams is not None
        np.testing.assert_allclose(sums.left_grams, wanted.left_grams, atol=1e-4 * np.abs(wanted.left_grams).max())
    else:
        assert sums.left_grams is None


def test_measuring_alone_finds_the_same(family: Family, state: State) -> None:
    settings = settings_for("exact")
    rows = make_rows(family, RANK, settings)
    alone, (swept, _) = (
        measure(make_pool(family, rows), state, make_job(settings), silent),
        sweep(make_pool(family, rows), state, make_job(settings), silent),
    )
    assert (alone.relative_error, alone.train_error, alone.validation_error) == (
        swept.relative_error,
        swept.train_error,
        swept.validation_error,
    )
    np.testing.assert_array_equal(alone.expert_errors, swept.expert_errors)


def test_ridged_left_factors_are_counted(family: Family, state: State) -> None:
    bank = state.bank.clone()
    bank[:2, 1] = bank[:2, 0]  # two atoms that repeat a row
    codes = np.zeros_like(state.codes)
    codes[:, 3] = 1
    codes[:5] = [1, 0.5, 0, 0, 0]
    found = measure(
        make_pool(family, make_rows(family, RANK, Settings())), State(bank, codes, 1.0), make_job(Settings()), silent
    )
    assert found.ridged == 5


def test_irregular_codes_are_counted_over_all_batches(
    family: Family, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "coding_step", lambda *rest: replace(coding_step(*rest), irregular=2))
    settings = settings_for("exact")
    rows = make_rows(family, RANK, settings)
    _, sums = sweep(make_pool(family, rows), state, make_job(settings, blocks=Blocks(experts=1)), silent)
    assert sums.irregular == 2 * EXPERTS


def test_without_held_out_rows_there_is_no_validation_error(family: Family, state: State) -> None:
    settings = settings_for("exact", validation_share=0.0)
    found = measure(make_pool(family, make_rows(family, RANK, settings)), state, make_job(settings), silent)
    assert np.isnan(found.validation_error)
    assert found.train_error == found.relative_error


@pytest.fixture(scope="module")
def poisoned(weights: Array, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same family, but for the held-out rows: large random numbers."""
    held_out = np.arange(16, ROWS, 32)
    spoilt = weights.copy()
    spoilt[:, held_out] = 1e3 * np.random.default_rng(9).standard_normal((EXPERTS, len(held_out), WIDTH))
    return make_family(tmp_path_factory.mktemp("poisoned"), spoilt)


def everything_learnt(family: Family, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Seeds and the states of every loop, with what is said of the training rows."""
    rows = make_rows(family, RANK, settings)
    seeds = ts_pca(seed_task(family, rows, ATOMS, init_codes=settings.init_codes))
    states: list[State] = []

    def spy(pool: Pool, state: State, *rest: Any) -> Any:
        states.append(state)
        return sweep(pool, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("globe.fit.training.sweep", spy)
        training = train(
            make_pool(family, rows), State(seeds.bank, seeds.codes, settings.temperature), make_job(settings), silent
        )
    return {
        "rows": [rows.proxy.tolist(), rows.validation.tolist()],
        "banks": [state.bank for state in states],
        "codes": [torch.from_numpy(state.codes) for state in states],
        "temperatures": [state.temperature for state in states],
        "train": [record.train_error for record in training.history],
        "validation": [record.validation_error for record in training.history],
    }


@pytest.mark.parametrize("codes", ["entmax", "nnls"])
@pytest.mark.parametrize("selector", ["energy", "uniform", "random"])
@pytest.mark.parametrize("mod", MODS)
def test_held_out_rows_teach_nothing(
    mod: str, selector: str, codes: str, family: Family, poisoned: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(mod=mod, selector=selector, codes=codes, outer_loops=3, support=3)  # type: ignore[arg-type]
    clean, spoilt = (everything_learnt(which, settings, monkeypatch) for which in (family, poisoned))
    assert clean["rows"] == spoilt["rows"]
    assert clean["rows"][1] == [16, 48]
    assert len(clean["banks"]) == 3
    for key in ("banks", "codes"):
        assert all(torch.equal(*pair) for pair in zip(clean[key], spoilt[key], strict=True)), key
    assert clean["temperatures"] == spoilt["temperatures"]
    assert clean["train"] == spoilt["train"]
    assert all(a != b for a, b in zip(clean["validation"], spoilt["validation"], strict=True))


def test_experts_of_zeros_do_no_harm(weights: Array, state: State, tmp_path: Path) -> None:
    weights = weights.copy()
    weights[3] = 0
    family = make_family(tmp_path, weights)
    for mod in MODS:
        found, sums = sweep(
            make_pool(family, make_rows(family, RANK, Settings())), state, make_job(settings_for(mod)), silent
        )
        assert found.expert_errors[3] == 0
        assert np.isfinite(found.relative_error)
        assert torch.isfinite(sums.right_side).all()
        assert np.isfinite(sums.codes).all() and (sums.codes.max(1) > 0).all()
