"""Architectures of transformers, from their own configuration classes: a few here, all of them by `-m slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import table_of_architectures as table
from architectures import model_types
from judged import STEPS, judge

FEW = ("deepseek_v4", "gemma4", "granitemoe_swa", "jamba", "kimi_linear", "lfm2_moe", "qwen3_vl_moe")


@pytest.mark.parametrize("model_type", FEW)
def test_a_form_of_names(model_type: str, tmp_path: Path) -> None:
    found = judge(model_type, tmp_path)
    assert found.works == STEPS, found.why


@pytest.mark.slow
def test_every_architecture_does_what_the_page_says(tmp_path: Path) -> None:
    found = [judge(name, tmp_path / name) for name in model_types()]
    assert table.rows(found) == table.written()
    counts = {step: sum(step in each.works for each in found) for step in STEPS}
    assert counts["exports"] >= 60 and counts["runs factored"] >= 55 and counts["calibrates"] >= 55
