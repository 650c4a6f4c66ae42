"""Ridge regression from sums over tokens."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from globe.correction.regression import RIDGES, Normal, regress  # noqa: E402


def _sums(inputs: np.ndarray, residuals: np.ndarray) -> Normal:
    normal = Normal.none(inputs.shape[1], residuals.shape[1])
    for part in np.array_split(np.arange(len(inputs)), 3):
        normal.add(torch.from_numpy(inputs[part]).float(), torch.from_numpy(residuals[part]).float())
    return normal


def _problem(seed: int, noise: float, tokens: int = 240) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, 12)) * np.geomspace(1, 0.1, 12)
    return inputs, inputs @ rng.standard_normal((12, 5)) + noise * rng.standard_normal((tokens, 5))


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_the_ridge_is_the_best_for_tokens_held_out(noise: float) -> None:
    inputs, residuals = _problem(0, noise)
    found = regress(_sums(inputs[:160], residuals[:160]), _sums(inputs[160:], residuals[160:]))
    errors = {}
    for ridge in RIDGES:
        square = inputs[:160].T @ inputs[:160]
        damped = square + ridge * np.diag(square).mean() * np.eye(12)
        change = np.linalg.solve(damped, inputs[:160].T @ residuals[:160])
        errors[ridge] = float(np.square(residuals[160:] - inputs[160:] @ change).sum())
    best = min(errors, key=lambda ridge: errors[ridge])
    assert found.ridge == best
    assert found.after == pytest.approx(errors[best], rel=1e-4, abs=1e-3)
    assert found.before == pytest.approx(float(np.square(residuals[160:]).sum()), rel=1e-5)


def test_what_does_not_hold_elsewhere_is_not_taken() -> None:
    inputs, residuals = _problem(1, 0.1)
    found = regress(_sums(inputs[:160], residuals[:160]), _sums(inputs[160:], -residuals[160:]))
    assert found.ridge is None and found.after == found.before
    assert not found.change.any()


def test_without_tokens_nothing_changes() -> None:
    inputs, residuals = _problem(2, 0.1)
    nothing, some = Normal.none(12, 5), _sums(inputs, residuals)
    for fitted, held in ((nothing, some), (some, nothing), (nothing, nothing)):
        found = regress(fitted, held)
        assert found.ridge is None and not found.change.any()


def test_halves_merged_are_the_whole() -> None:
    inputs, residuals = _problem(3, 0.1)
    merged = _sums(inputs[:100], residuals[:100])
    merged.merge(_sums(inputs[100:], residuals[100:]))
    whole = _sums(inputs, residuals)
    torch.testing.assert_close(merged.upper, whole.upper, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(merged.cross, whole.cross, rtol=1e-5, atol=1e-4)
    assert merged.energy == pytest.approx(whole.energy, rel=1e-6)
