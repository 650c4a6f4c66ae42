"""Which state the loop keeps, when it ends and what it records, with measures prescribed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families import make_job, make_pool, silent
from globe.checkpoint.family import Family
from globe.compute.blocks import Blocks
from globe.fit import training
from globe.fit.sums import Measure, State, Sums
from globe.fit.training import Training, train
from globe.seeds.proxies import Rows
from globe.settings import Settings

NOBODY = Family("gate", (), 1, 1)
NO_ROWS = Rows(*[np.empty(0, np.int64)] * 3)


class Script:
    """A loop whose measures are prescribed: (relative, validation, support) of every state from the first on."""

    def __init__(self, lines: list[tuple[float, float, int]], irregular: int = 0) -> None:
        self.lines, self.irregular = lines, irregular
        self.relaxations: list[float] = []

    def state(self, number: int) -> State:
        codes = np.zeros((3, 30))
        codes[:, : self.lines[number][2]] = 1
        return State(torch.full((30, 1, 1), float(number)), codes, 1.0)

    def measure(self, pool: Any, state: State, *rest: Any) -> Measure:
        error, validation, _ = self.lines[int(state.bank[0, 0, 0])]
        return Measure(error, error, validation, np.full(3, error), 0)

    def sweep(self, pool: Any, state: State, *rest: Any) -> tuple[Measure, Sums]:
        return self.measure(pool, state), Sums(state.codes, self.irregular, state.bank, None)

    def step(self, state: State, sums: Sums, settings: Settings, relaxation: float, blocks: Blocks) -> State:
        self.relaxations.append(relaxation)
        return self.state(int(state.bank[0, 0, 0]) + 1)

    def play(self, **settings: Any) -> tuple[Training, list[str]]:
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for name, fake in (("sweep", self.sweep), ("measure", self.measure), ("_dictionary_step", self.step)):
                patch.setattr(training, name, fake)
            chosen = Settings(**{"codes": "nnls", "outer_loops": len(self.lines) - 1, **settings})
            return train(make_pool(NOBODY, NO_ROWS), self.state(0), make_job(chosen, lines=lines), silent), lines


def numbers(found: Training) -> tuple[int, int, str]:
    """Which state was kept, how many loops were run, and why they ended."""
    return int(found.state.bank[0, 0, 0]), len(found.history), found.stopped


def test_the_lowest_error_over_all_rows_is_kept_and_the_first_of_equals() -> None:
    falling = [(error, 1 - number / 10, 5) for number, error in enumerate((0.9, 0.5, 0.3, 0.4, 0.3, 0.8))]
    assert numbers(Script(falling).play()[0]) == (2, 5, "outer_loops")
    rising = [(0.1, 0.9, 5), (0.2, 0.5, 5), (0.3, 0.2, 5)]
    assert numbers(Script(rising).play()[0]) == (0, 2, "outer_loops")


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_plateau_of_the_held_out_error_ends_the_loop(patience: int) -> None:
    errors = [0.9, 0.5, 0.3, *[0.3 * (1 - 1e-5) ** k for k in range(1, 12)]]
    lines = [(1 - number / 100, error, 5) for number, error in enumerate(errors)]  # the error itself still falls
    found, _ = Script(lines).play(patience=patience)
    assert numbers(found) == (2 + patience, 2 + patience, "plateau")


def test_a_gain_in_between_starts_the_count_again() -> None:
    errors = [0.9, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    found, _ = Script([(0.5, error, 5) for error in errors]).play(patience=3)
    assert numbers(found)[1:] == (7, "plateau")


def test_no_plateau_while_the_support_moves() -> None:
    moving = [(0.5, 0.5, 3 + 2 * number) for number in range(9)]
    assert numbers(Script(moving).play(patience=2)[0])[1:] == (8, "outer_loops")
    assert numbers(Script(moving).play(patience=2, support_tolerance=2.0)[0])[1:] == (3, "plateau")


def test_all_rows_judge_where_none_are_held_out() -> None:
    flat = [(0.5, float("nan"), 5)] * 9
    assert numbers(Script(flat).play(patience=2)[0])[1:] == (3, "plateau")
    falling = [(0.5 - number / 100, float("nan"), 5) for number in range(9)]
    found, _ = Script(falling).play(patience=2)
    assert numbers(found)[1:] == (8, "outer_loops")
    assert found.history[0].validation_error is None


def test_over_relaxation_starts_with_the_second_loop_and_ends_when_the_error_rises() -> None:
    script = Script([(error, 0.5 / (1 + number), 5) for number, error in enumerate((0.9, 0.5, 0.3, 0.4, 0.2, 0.1))])
    found, lines = script.play(over_relaxation=0.7)
    assert script.relaxations == [0.0, 0.7, 0.7, 0.0, 0.0]
    assert [record.over_relaxation for record in found.history] == script.relaxations
    assert sum("over-relaxation is off" in line for line in lines) == 1


def test_every_rise_of_the_error_is_said() -> None:
    errors = (0.9, 0.5, 0.6, 0.4, 0.41, 0.1)
    _, lines = Script([(error, 0.5 / (1 + number), 5) for number, error in enumerate(errors)]).play(over_relaxation=0.0)
    assert [line for line in lines if "rose" in line] == [f"gate: loop {loop}: the error rose" for loop in (2, 4)]


def test_irregular_codes_are_recorded_and_said() -> None:
    found, lines = Script([(0.5, 0.5 / (1 + number), 5) for number in range(3)], irregular=2).play()
    assert [record.irregular_codes for record in found.history] == [2, 2]
    assert sum("2 coding problems were singular or did not converge" in line for line in lines) == 2
