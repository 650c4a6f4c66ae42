"""The joint fit: it descends, recovers what was planted, keeps to its supports and goes on where it was stopped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import make_tiny
from dense import dense_of, problem_of, random_metric
from families import CPU, make_family, make_job, planted, random_state, silent
from globe import Settings, compress, export
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.compute.codes import supports
from globe.fit.codes import coding_step
from globe.fit.joint import _centre, fit_joint
from globe.fit.joint_steps import Steps
from globe.fit.sums import State
from globe.runs import store as store_module
from globe.runs.store import FOLDER, MemoryStore, RunStore, Store
from globe.statistics.calibrate import FILE, STATISTICS
from globe.statistics.calibration import load_calibration
from globe.statistics.metric import Metric, build_metric
from killed import CALIBRATES, Killer
from trips import digests

EXPERTS, ATOMS, RANK, P, D = 12, 6, 3, 8, 12


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    weights = planted(0, experts=EXPERTS, p=P, d=D, rank=RANK, atoms=ATOMS, uses=3, noise=0.2)
    return make_family(tmp_path_factory.mktemp("joint"), weights)


def metric_of(kind: str) -> Metric | None:
    return random_metric(kind, experts=EXPERTS, p=P, d=D)


@dataclass(frozen=True)
class Found:
    state: State
    steps: Steps


def fit(
    family: Family,
    metric: Metric | None = None,
    start: State | None = None,
    store: Store | None = None,
    **changed: Any,
) -> Found:
    settings = Settings(**{"joint_steps": 10, "support": 3, **changed})
    start = start or random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    problem = problem_of(family, metric, shape=(ATOMS, RANK, D), settings=settings)
    job = make_job(settings, store=store)
    with job.stages.stage("joint", 1):
        return Found(*fit_joint(problem, start, job, silent))


def errors(found: Found) -> list[float]:
    return [segment.error for segment in found.steps.history]


def value_at(family: Family, metric: Metric | None, state: State) -> float:
    return float(dense_of(family, metric).shares(state.bank.double(), torch.from_numpy(state.codes)).sum())


@pytest.mark.parametrize("kind", ["none", "shared", "scaled", "own", "rows"])
@pytest.mark.parametrize("codes", ["signed", "nnls", "simplex"])
def test_the_error_falls(codes: str, kind: str, family: Family) -> None:
    found = fit(family, metric_of(kind), codes=codes)
    line = errors(found)
    assert len(line) >= 3 and all(later <= before for before, later in pairwise(line))
    assert line[-1] < 0.7 * line[0]
    assert value_at(family, metric_of(kind), found.state) == pytest.approx(line[-1], rel=2e-2)
    norms = torch.linalg.vector_norm(found.state.bank.flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.ones(ATOMS), rtol=1e-5, atol=1e-5)
    assert found.steps.evaluations > found.steps.step
    assert found.steps.stopped in ("joint_steps", "plateau", "no descent")
    lines = found.steps.history
    assert [one.step for one in lines] == list(range(len(lines)))
    assert [one.iterations for one in lines] == sorted({one.iterations for one in lines}) and lines[0].iterations == 0
    assert all(later.evaluations > one.evaluations for one, later in pairwise(lines))
    assert found.steps.report()["history"][-1]["iterations"] == found.steps.iterations == lines[-1].iterations


@pytest.mark.parametrize("codes", ["entmax", "sparsemax"])
@pytest.mark.parametrize("support", [1, 2, 4])
def test_supports_shrink_to_their_target(support: int, codes: str, family: Family) -> None:
    found = fit(family, metric_of("scaled"), codes=codes, support=support)
    assert found.steps.initial_support == ATOMS
    assert np.median(supports(found.state.codes)) <= support
    np.testing.assert_allclose(found.state.codes.sum(1), 1, rtol=1e-12)
    assert found.state.codes.min() >= 0 and supports(found.state.codes).min() >= 1
    for one, other in pairwise(found.steps.history):
        assert other.support_median <= one.support_median
        if other.support_median == one.support_median:
            assert other.error <= one.error
    assert found.state.temperature <= 1


@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_supports_are_met_where_the_fit_is_exact(kind: str, tmp_path: Path) -> None:
    weights = planted(3, experts=EXPERTS, p=P, d=D, rank=RANK, atoms=1)
    found = fit(make_family(tmp_path, weights), metric_of(kind), support=1, codes="entmax")
    assert np.median(supports(found.state.codes)) == 1


def test_signed_codes_are_dense_and_of_both_signs(family: Family) -> None:
    codes = fit(family, codes="signed").state.codes
    assert codes.min() < 0 < codes.max() and np.count_nonzero(codes) == codes.size


def test_nnls_codes_keep_their_support(family: Family) -> None:
    start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    start.codes[:, ::2] = 0
    codes = fit(family, start=start, codes="nnls").state.codes
    assert codes.min() >= 0 and (codes[:, ::2] == 0).all()


def one_atom_each() -> State:
    start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    return State(start.bank, np.eye(ATOMS)[np.arange(EXPERTS) % ATOMS], start.temperature)


@pytest.mark.parametrize("codes", ["entmax", "nnls", "simplex"])
def test_experts_of_one_atom_get_others(codes: str, family: Family) -> None:
    alone = fit(family, start=one_atom_each(), codes=codes, support=1)
    mixed = fit(family, start=one_atom_each(), codes=codes, support=3)
    assert (supports(alone.state.codes) == 1).all() and supports(mixed.state.codes).max() == 3
    assert errors(mixed)[-1] < 0.5 * errors(mixed)[0] and not mixed.steps.lost


@pytest.mark.parametrize("codes", ["signed", "nnls"])
@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_a_planted_model_is_recovered(kind: str, codes: str, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    bank = random.standard_normal((ATOMS, RANK, D))
    alpha = random.uniform(0.3, 1, (EXPERTS, ATOMS)) * (random.random((EXPERTS, ATOMS)).argsort(1) < 3)
    weights = random.standard_normal((EXPERTS, P, RANK)) @ np.einsum("ij,jrd->ird", alpha, bank)
    family = make_family(tmp_path, weights)
    near = bank + 0.3 * random.standard_normal(bank.shape)
    start = State(torch.from_numpy(near).float(), alpha * random.uniform(0.7, 1.3, alpha.shape), 1.0)
    assert value_at(family, metric_of(kind), start) > 0.02
    found = fit(family, metric_of(kind), start, codes=codes, joint_steps=40, tolerance=0.0)
    assert errors(found)[-1] < 1e-4
    assert value_at(family, metric_of(kind), found.state) < 1e-4


def test_it_stops_at_an_exact_fit(tmp_path: Path) -> None:
    state = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    mixed = np.einsum("ij,jrd->ird", state.codes, state.bank.double().numpy())
    family = make_family(tmp_path, np.random.default_rng(0).standard_normal((EXPERTS, P, RANK)) @ mixed)
    found = fit(family, start=state, codes="signed")
    assert (found.steps.stopped, found.steps.step, len(found.steps.history)) == ("exact", 0, 1)


def test_a_plateau_ends_it(family: Family) -> None:
    found = fit(family, codes="signed", joint_steps=20, tolerance=1e-2)
    assert found.steps.stopped == "plateau" and 10 <= found.steps.step < 20
    before, last = errors(found)[-2:]
    assert 0.95 * before < last < before
    assert fit(family, codes="signed", joint_steps=20, tolerance=1e-9).steps.step > found.steps.step


@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_the_coordinates_that_it_moves_to(kind: str, family: Family) -> None:
    """The mean of B̃'B̃'ᵀ is the identity there, and f is what it was."""
    state = random_state(2, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    problem = problem_of(family, metric_of(kind), shape=(ATOMS, RANK, D))
    value = problem.look(state.bank, state.codes, 0, silent)
    turn = _centre(value.gram)
    again = problem.look(turn @ state.bank, state.codes, 0, silent)
    torch.testing.assert_close(turn.double() @ value.gram @ turn.double(), torch.eye(RANK, dtype=torch.float64))
    assert again.error == pytest.approx(value.error, rel=1e-5)
    slopes = turn.mT @ again.bank
    assert torch.linalg.vector_norm(slopes - value.bank) <= 1e-3 * torch.linalg.vector_norm(value.bank)
    flat = _centre(torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)))
    assert bool(flat.isfinite().all()) and flat[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize("codes", ["nnls", "entmax"])
def test_codes_of_free_size_stay_where_they_are(codes: str, family: Family) -> None:
    """The size of an expert's codes changes nothing: the code of a lone atom has rounding for a slope."""
    start = random_state(1, experts=EXPERTS, atoms=ATOMS, rank=RANK, d=D)
    start.codes[:, 1:] = 0
    start.codes[: EXPERTS // 2, 1] = 1e-12
    found = fit(family, start=start, codes=codes, support=2, joint_steps=14)
    assert 1e-3 < found.state.codes.max() < 1e3
    assert errors(found)[-1] <= errors(found)[0]


class Killed(Exception):
    """In place of a kill."""


@dataclass
class Dying(MemoryStore):
    """Dies after some saves."""

    left: int = 0

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        super().save(name, tensors, meta)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def unstopped(family: Family) -> Callable[[str], Found]:
    """Return a function that gives the fit with codes of a kind, each made once."""
    return functools.cache(lambda codes: fit(family, metric_of("scaled"), codes=codes))


@pytest.mark.parametrize("codes", ["entmax", "signed"])
@pytest.mark.parametrize("saves", [1, 2, 3])
def test_it_goes_on_where_it_was_stopped(
    saves: int, codes: str, family: Family, unstopped: Callable[[str], Found]
) -> None:
    whole = unstopped(codes)
    store = Dying(left=saves)
    with pytest.raises(Killed):
        fit(family, metric_of("scaled"), store=store, codes=codes)
    again = fit(family, metric_of("scaled"), store=store, codes=codes)
    assert torch.equal(again.state.bank, whole.state.bank)
    assert np.array_equal(again.state.codes, whole.state.codes)
    for name in ("step", "evaluations", "iterations", "stopped"):
        assert getattr(again.steps, name) == getattr(whole.steps, name)
    assert errors(again) == errors(whole) and again.state.temperature == whole.state.temperature


def test_the_metric_is_what_it_lowers(family: Family) -> None:
    metric = metric_of("shared")
    ours, plain = (fit(family, kind, codes="signed").state for kind in (metric, None))
    assert value_at(family, metric, ours) < value_at(family, metric, plain)
    assert value_at(family, None, plain) < value_at(family, None, ours)


def test_signed_codes_of_the_loop_are_least_squares() -> None:
    random = np.random.default_rng(0)
    bank, targets = random.standard_normal((5, 30)), random.standard_normal((8, 30))
    for temperature in (1e-3, 1.0):
        found = coding_step(bank @ bank.T, targets @ bank.T, Settings(codes="signed", support=1), temperature)
        wanted = np.linalg.lstsq(bank.T, targets.T, rcond=None)[0].T
        np.testing.assert_allclose(found.codes, wanted, atol=1e-9)
        assert found.logits is None and found.irregular == 0
    twice = np.concatenate([bank, bank[:1]])
    found = coding_step(twice @ twice.T, targets @ twice.T, Settings(codes="signed", epsilon=0.0), 1.0)
    np.testing.assert_allclose(found.codes[:, 0], found.codes[:, 5], atol=1e-8)  # of least norm
    np.testing.assert_allclose(found.codes @ twice, wanted @ bank, atol=1e-8)


SMALL: dict[str, Any] = {
    "rank": 0.5,
    "bank_size": 3,
    "outer_loops": 1,
    "joint_steps": 4,
    "support": 2,
    "device": "cpu",
    "threads": 1,
    "families": ("gate", "up", "down"),
    "calibration_tokens": 1024,
}


def seen_error(family: Family, stored: Family, metric: Metric | None) -> float:
    lost = whole = 0.0
    for number in range(len(family)):
        wanted, found = family.read(number).float(), stored.read(number).float()
        if metric is not None:
            one = slice(number, number + 1)
            wanted, found = metric.weigh(one, wanted[None])[0], metric.weigh(one, found[None])[0]
        lost += float((wanted - found).double().square().sum())
        whole += float(wanted.double().square().sum())
    return lost / whole


@pytest.mark.parametrize("layout", ["olmoe", "granitemoe"])
@pytest.mark.parametrize("calibrate", ["none", "pydoc"])
def test_the_files_hold_what_metrics_say(calibrate: str, layout: str, tmp_path: Path) -> None:
    source = make_tiny(layout, tmp_path / "source", dtype="float32")
    settings = Settings(**SMALL, calibrate=calibrate)
    result = compress(source, tmp_path / "out", settings, keep_run=True)
    export(tmp_path / "out", tmp_path / "dense")
    assert (result.metrics["calibration"] is not None) == (calibrate == "pydoc")
    told = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["families"]
    names = [stage["name"] for stage in result.metrics["stages"]]
    assert names.count("calibrate") == (calibrate == "pydoc") and names.count("gate: joint") == 1
    for name in SMALL["families"]:
        family, stored = (Checkpoint(tmp_path / place).family(name) for place in ("source", "dense"))
        assert told[name]["relative_error"] == pytest.approx(seen_error(family, stored, None), rel=1e-4)
        history = [segment["error"] for segment in told[name]["joint"]["history"]]
        assert history[-1] < history[0] == told[name]["init"]["relative_error"] and told[name]["history"] == []
        if calibrate == "none":
            assert told[name]["weighted_error"] is None
            assert told[name]["relative_error"] == pytest.approx(history[-1], rel=2e-2)
        else:
            found = load_calibration(tmp_path / "out" / FOLDER / STATISTICS / FILE)
            metric = build_metric(family, found, settings, CPU)
            assert told[name]["weighted_error"] == pytest.approx(seen_error(family, stored, metric), rel=1e-3)
            assert told[name]["weighted_error"] == pytest.approx(history[-1], rel=5e-2)
        assert told[name]["support_median"] <= 2


@pytest.mark.parametrize("calibrate", ["none", "pydoc"])
def test_the_error_of_the_seeds_is_that_of_the_loops_seeds(calibrate: str, tmp_path: Path) -> None:
    source, seeds = make_tiny("olmoe", tmp_path / "source"), []
    for solver in ("joint", "alternate"):
        settings = Settings(**{**SMALL, "families": ("gate",)}, solver=solver, calibrate=calibrate)  # type: ignore[arg-type]
        found = compress(source, tmp_path / solver, settings).metrics["families"]["gate"]
        seeds.append(found["init"]["relative_error"])
        assert found["relative_error"] != seeds[-1]
    assert seeds[0] == pytest.approx(seeds[1], rel=1e-4)


def test_a_fit_too_short_keeps_its_start(tmp_path: Path) -> None:
    changed = {"method": "grouped-subspace", "joint_steps": 1, "bank_size": 4, "support": 4, "families": ("gate",)}
    source = make_tiny("olmoe", tmp_path / "source")
    result = compress(source, tmp_path / "out", Settings(**{**SMALL, **changed, "calibrate": "none"}))
    found = result.metrics["families"]["gate"]
    first, last = (found["joint"]["history"][place] for place in (0, -1))
    assert first["support_median"] == 1 and last["error"] > first["error"]
    assert found["support_median"] == 1 and found["relative_error"] == pytest.approx(first["error"], rel=2e-2)


def test_a_killed_run_ends_with_the_same_files(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    settings = {**SMALL, "families": ["gate", "up"], "calibrate": "pydoc"}
    whole = digests(compress(source, tmp_path / "whole", Settings(**settings)).directory)
    with Killer(*CALIBRATES) as killer:
        for call in (1, 2):
            assert killer.run(source, tmp_path / "out", settings, place="globe.fit.joint:save_joint", call=call) == -9
        assert killer.run(source, tmp_path / "out", settings, place="globe.fit.stages:_save_fit", call=1) == -9
        assert killer.run(source, tmp_path / "out", settings) == 0
    assert digests(tmp_path / "out") == whole
    assert not (tmp_path / "out" / FOLDER).exists()


def test_a_process_that_ends_while_it_saves_has_the_state_before(family: Family, tmp_path: Path) -> None:
    whole, store = fit(family), RunStore(tmp_path / "run", {}, {}, lambda line: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("globe.runs.store._digest", dying_at("3", store_module._digest))
        fit(family, store=store)
    assert "gate.joint-2" in store.names()
    again = fit(family, store=RunStore(tmp_path / "run", {}, {}, lambda line: None))
    assert errors(again) == errors(whole) and torch.equal(again.state.bank, whole.state.bank)


def dying_at(step: str, digest: Callable[[Any], str]) -> Callable[[Any], str]:
    """End the process, as it were, between the two files of the state of a step."""

    def digest_or_die(value: Any) -> str:
        if str(value["meta"].get("step")) == step:
            raise Killed
        return digest(value)

    return digest_or_die
