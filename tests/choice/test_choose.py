"""The choice of seeds: planted families whose answer is known, and methods made to order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import Array, clustered, make_family, make_job, make_rows, planted, seed_task, silent
from globe.choice.choose import ORDER, SAMPLE, Choice, choose, cost
from globe.errors import GlobeError
from globe.fit.dictionary import unit_atoms
from globe.seeds import METHODS, Seeds, SeedTask
from globe.settings import Settings

Method = Callable[[SeedTask], Seeds]


def task_of(directory: Path, weights: Array, size: int, rank: int = 8, **changed: object) -> SeedTask:
    family = make_family(directory, weights)
    scratch = directory / "scratch"
    scratch.mkdir()
    return seed_task(family, make_rows(family, rank, Settings()), size, scratch=scratch, **changed)


def fake(noise: float, explained: float = 0.9, calls: list[float] | None = None) -> Method:
    """Seeds whose error grows with `noise`: a group's true row space, spoilt."""

    def seed(task: SeedTask) -> Seeds:
        if calls is not None:
            calls.append(noise)
        weights = torch.stack([task.family.read(number) for number in range(len(task.family))])
        right = torch.linalg.svd(weights.flatten(0, 1), full_matrices=False)[2][: task.rank]
        random = torch.Generator().manual_seed(0)
        bank = right + noise * torch.randn(task.size, task.rank, task.family.d, generator=random)
        bank, _ = unit_atoms(bank.contiguous(), np.ones((1, task.size)))
        return Seeds(bank, np.eye(task.size)[np.arange(len(task.family)) % task.size], explained, 1 - explained)

    return seed


def failing(task: SeedTask) -> Seeds:
    raise GlobeError("no seeds today")


def tried(choice: Choice) -> list[str]:
    return [found.method for found in choice.tries]


@pytest.fixture
def task(tmp_path: Path) -> SeedTask:
    return task_of(tmp_path, clustered(1, groups=1, each=12, noise=0.5), 3)


def test_a_shared_pattern_is_left_to_ts_pca(tmp_path: Path) -> None:
    common = np.random.default_rng(0).uniform(0.5, 2, (12, 1, 1)) * planted(1, experts=1, p=24, d=32, rank=8, atoms=1)
    noisy = common + 0.01 * np.random.default_rng(1).standard_normal(common.shape)
    choice = choose(task_of(tmp_path, noisy, 2), METHODS, silent)
    assert choice.chosen == "ts-pca" and tried(choice) == ["ts-pca"]
    assert "is low enough" in choice.skipped["grouped-subspace"]


def test_shuffled_rows_in_groups_are_left_to_grouped_subspace(tmp_path: Path) -> None:
    task = task_of(tmp_path, clustered(2, groups=4, each=5, noise=0.1), 4)
    steps: list[float] = []
    choice = choose(task, METHODS, steps.append)
    assert choice.chosen == "grouped-subspace" and sum(steps) == len(ORDER)
    assert tried(choice)[0] == "ts-pca" and tried(choice)[-1] == "grouped-subspace"
    assert choice.tries[0].relative_error > 0.3 > 0.1 > choice.tries[-1].relative_error  # type: ignore[operator]
    again = METHODS["grouped-subspace"](task)
    assert torch.equal(choice.seeds.bank, again.bank) and np.array_equal(choice.seeds.codes, again.codes)
    assert not list(task.scratch.iterdir())


def test_the_best_is_kept_and_told(task: SeedTask) -> None:
    lines: list[str] = []
    methods = {"ts-pca": fake(1.0), "left-gram": fake(0.1), "grouped-subspace": fake(0.3), "rpca": fake(0.5)}
    choice = choose(replace(task, job=make_job(Settings(seed_budget=1e6), lines=lines)), methods, silent)
    assert tried(choice) == list(methods) and choice.chosen == "left-gram"
    assert torch.equal(choice.seeds.bank, methods["left-gram"](task).bank)
    told = choice.as_dict()
    assert told["tries"][1]["relative_error"] < told["tries"][2]["relative_error"] and "left-gram" not in told["why"]
    assert set(told["tries"][0]) >= {"method", "proxy_error", "explained_variance", "relative_error", "seconds"}
    assert choice.skipped == {"residual-greedy": "not available"}
    assert len(lines) == 5 and "left-gram chosen: relative error 0." in lines[-1]


def test_what_the_numbers_rule_out(task: SeedTask) -> None:
    budget = replace(task, job=make_job(Settings(seed_budget=1e6)))
    methods = {"ts-pca": fake(1.0, 0.3), "left-gram": fake(0.9), "grouped-subspace": fake(0.3)}
    methods |= {"rpca": fake(0.0), "residual-greedy": fake(0.0)}
    choice = choose(budget, methods, silent)
    assert tried(choice) == ["ts-pca", "left-gram", "grouped-subspace"]
    assert "left-gram, which grouped-subspace beats" in choice.skipped["rpca"]
    assert "explain 30% of the proxies" in choice.skipped["residual-greedy"]
    assert choose(budget, methods | {"ts-pca": fake(1.0, 0.7)}, silent).chosen == "residual-greedy"


def test_the_budget_is_of_modelled_cost_not_of_time(task: SeedTask) -> None:
    methods = {name: fake(1.0 - 0.1 * place) for place, name in enumerate(ORDER)}
    least = choose(replace(task, job=make_job(Settings(seed_budget=1.0))), methods, silent)
    assert tried(least) == ["ts-pca"] and "seed_budget" in least.skipped["left-gram"]
    both = 1.01 * (cost("ts-pca", task) + cost("left-gram", task)) / cost("ts-pca", task)
    assert tried(choose(replace(task, job=make_job(Settings(seed_budget=both))), methods, silent))[:2] == [
        "ts-pca",
        "left-gram",
    ]
    for method in (*ORDER, "another"):
        assert cost(method, task) > 0


def test_a_method_that_fails_is_told(task: SeedTask) -> None:
    choice = choose(task, {"ts-pca": failing, "grouped-subspace": fake(0.0)}, silent)
    assert choice.chosen == "grouped-subspace" and choice.tries[0].error == "no seeds today"
    with pytest.raises(GlobeError, match="no seeds today"):
        choose(task, {"ts-pca": failing}, silent)
    with pytest.raises(GlobeError, match="none of ts-pca"):
        choose(task, {}, silent)


def test_large_families_are_sampled(tmp_path: Path) -> None:
    weights = clustered(3, groups=4, each=2 * SAMPLE // 4, noise=0.5, p=10, d=12, rank=4)
    choice = choose(task_of(tmp_path, weights, 4, rank=4), {"ts-pca": METHODS["grouped-subspace"]}, silent)
    said = choice.tries[0]
    assert said.relative_error == pytest.approx(said.proxy_error, rel=0.05)
    assert said.relative_error != pytest.approx(said.proxy_error, rel=1e-6)
