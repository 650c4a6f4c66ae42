"""What the report warns of, and when it does not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from globe.fit.codes import TEMPERATURE_BOUNDS
from globe.report.data import FamilyView, PoolView, Run
from globe.report.findings import findings, outliers
from globe.settings import Settings

EXPERTS, ATOMS, LAYERS = 40, 6, 4
REPORT: dict[str, Any] = {
    "init": {"relative_error": 0.3},
    "relative_error": 0.1,
    "weighted_error": None,
    "support_median": 12.0,
    "coherence_max": 0.2,
    "coherent_pairs": [],
    "ridged_left_factors": 0,
    "stopped": "outer_loops",
    "history": [],
    "joint": {
        "stopped": "plateau",
        "history": [
            {"step": 0, "iterations": 0, "error": 0.3, "temperature": 1.0},
            {"step": 1, "iterations": 8, "error": 0.15, "temperature": 0.9},
            {"step": 2, "iterations": 17, "error": 0.1, "temperature": 0.9},
        ],
    },
}
LOOPS: list[dict[str, Any]] = [
    {"loop": 1, "relative_error": 0.2, "temperature": 1.0, "irregular_codes": 0},
    {"loop": 2, "relative_error": 0.15, "temperature": 0.9, "irregular_codes": 0},
]


def planted(**changed: Any) -> Run:
    """A run that there is nothing to say of but what is `changed` in its pool's report."""
    held = {**copy.deepcopy(REPORT), **changed}
    errors = np.linspace(0.09, 0.11, EXPERTS)
    layers, numbers = np.arange(EXPERTS) // 10, np.arange(EXPERTS) % 10
    family = FamilyView("gate", 8, 16, 4, ATOMS, layers, numbers, errors, None, held)
    users = np.full((ATOMS, LAYERS), 5)
    pool = PoolView("gate", 4, ATOMS, [0, 1, 2, 3], np.full(LAYERS, 10), users, users / 30, held)
    return Run("out", {"settings": Settings().as_dict(), "calibration": {"warnings": []}}, [family], [pool])


def texts(run: Run, *, warning: bool = True) -> list[str]:
    return [one.text for one in findings(run) if one.warning == warning]


def test_nothing_to_say() -> None:
    assert findings(planted()) == findings(planted(history=LOOPS)) == []


def test_dead_atoms() -> None:
    run = planted()
    run.pools[0].users[[1, 4]] = 0
    [told] = texts(run)
    assert "2 atoms of 6 are dead, used by no expert (1; 4)" in told
    run.pools[0].users[4] = 1
    assert "1 atom of 6 is dead" in texts(run)[0]


def test_duplicated_atoms() -> None:
    [told] = texts(planted(coherence_max=0.993, coherent_pairs=[[2, 5, 0.993], [0, 1, -0.96]]))
    assert "up to 0.993: 2 and 5 at 0.993; 0 and 1 at -0.960" in told
    older = planted(coherence_max=0.97)
    del older.pools[0].report["coherent_pairs"]
    assert "up to 0.970. One atom" in texts(older)[0]


def test_an_expert_far_above_the_rest() -> None:
    run = planted()
    run.families[0].errors[23] = 0.45
    [told] = texts(run)
    assert "1 expert of 40 has a relative error far above the rest" in told
    assert "layer 2 expert 3: 0.45, 4.5 times" in told
    weighted = np.full(EXPERTS, 0.01)
    weighted[[3, 14]] = 0.2, 0.3
    run = planted()
    [told] = texts(replace(run, families=[replace(run.families[0], weighted=weighted)]))
    assert "2 experts of 40 have an activation-weighted error" in told and "(layer 1 expert 4" in told
    assert outliers(np.array([0.1, 0.1, 0.1, 0.14])) == [] and outliers(np.zeros(5)) == []


@pytest.mark.parametrize(("bound", "side"), [(TEMPERATURE_BOUNDS[0], "lower"), (TEMPERATURE_BOUNDS[1], "upper")])
def test_temperature_at_its_bound(bound: float, side: str) -> None:
    joint = copy.deepcopy(REPORT["joint"])
    joint["history"][-1]["temperature"] = bound
    [told] = texts(planted(joint=joint))
    assert f"ended at its {side} bound" in told and "12" in told
    run = planted(joint=joint)
    run.metrics["settings"]["codes"] = "nnls"
    assert texts(run) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"support_median": 16.0}, "the median support is 16, above the target of 12"),
        ({"ridged_left_factors": 3}, "3 left factors of 40 are ill-conditioned"),
        ({"relative_error": 0.31}, "0.31, above the 0.3 of the seeds"),
        ({"history": [{**LOOPS[0], "irregular_codes": 7}], "joint": None}, "7 coding problems in the last loop"),
    ],
)
def test_other_warnings(changed: dict[str, Any], said: str) -> None:
    [told] = texts(planted(**changed))
    assert said in told


def test_notes() -> None:
    joint = {**REPORT["joint"], "stopped": "joint_steps"}
    [told] = texts(planted(joint=joint), warning=False)
    assert "still fell by 33.3 % in the last 1 step; more --joint-steps" in told
    [told] = texts(planted(joint={**joint, "stopped": "time_limit"}), warning=False)
    assert told.endswith("; a longer --time-limit would lower it further.")
    [told] = texts(planted(joint=None, history=LOOPS), warning=False)
    assert "still fell by 25 % in the last 1 loop; more --outer-loops" in told
    run = planted()
    run.metrics["calibration"] = None
    assert "No activation statistics" in texts(run, warning=False)[0]
    run.metrics["calibration"] = {"warnings": ["layer 3 saw few tokens"]}
    assert texts(run) == ["Calibration: layer 3 saw few tokens"]
