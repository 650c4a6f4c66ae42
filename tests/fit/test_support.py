"""Which atoms an expert uses: Newton's codes against SciPy's NNLS, and the temperature that leaves a support."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import Array
from globe.fit.support import Quadratic, _damped, newton_codes, shrink_support

EXPERTS, ATOMS = 7, 9


def quadratic(seed: int) -> tuple[torch.Tensor, Array, Array]:
    """Curvature, codes and slope of every expert."""
    random = np.random.default_rng(seed)
    roots = random.standard_normal((EXPERTS, ATOMS, ATOMS))
    curvature = torch.from_numpy(roots @ roots.swapaxes(1, 2)).float()
    codes = random.uniform(0.1, 1, (EXPERTS, ATOMS)) * (random.random((EXPERTS, ATOMS)) < 0.7)
    codes[:, 0] += 0.1
    return curvature, codes, random.standard_normal((EXPERTS, ATOMS))


def nnls(block: Array, codes: Array, slope: Array) -> Array:
    root = np.linalg.cholesky(block).T
    found: Array = scipy.optimize.nnls(root, np.linalg.solve(root.T, block @ codes - slope))[0]
    return found


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_newton_codes_are_those_of_nnls(seed: int) -> None:
    curvature, codes, slope = quadratic(seed)
    found = newton_codes(Quadratic(curvature, codes, slope))
    for number in range(EXPERTS):
        wanted = nnls(_damped(curvature[number]), codes[number], slope[number])
        np.testing.assert_allclose(found[number], wanted if wanted.max() > 0 else codes[number], atol=1e-6)


def test_newton_codes_where_the_slope_puts_all_out() -> None:
    curvature, codes, slope = quadratic(0)
    found = newton_codes(Quadratic(curvature, codes, np.abs(slope) + 1e4))
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(("wanted", "alpha"), [(1.0, 1.5), (2.5, 1.1), (4.0, 2.0), (20.0, 1.5)])
@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_supports_are_shrunk_to_what_is_wanted(seed: int, wanted: float, alpha: float) -> None:
    curvature, codes, slope = quadratic(seed)
    model = Quadratic(curvature, codes, slope)
    grown = newton_codes(model)
    found, temperature = shrink_support(model, grown, wanted, alpha)
    assert (found >= 0).all() and (found.max(1) > 0).all()
    assert np.median(np.count_nonzero(found, axis=1)) <= wanted
    assert 1e-3 <= temperature <= 1
    weights = np.sqrt(np.diagonal(curvature.double().numpy(), axis1=1, axis2=2))
    contributions = grown * weights
    for number in range(EXPERTS):
        used = found[number] > 0
        assert (contributions[number][used] > 0).all()
        # every kept one is larger than what the map dropped; the refit may drop more
        kept = np.flatnonzero(used)
        order = np.argsort(-contributions[number])
        assert contributions[number][order[0]] >= contributions[number][kept].max()
        block = _damped(curvature[number])
        refit = nnls(block[np.ix_(kept, kept)], np.zeros(len(kept)), -(block @ codes[number] - slope[number])[kept])
        if refit.max() > 0:
            np.testing.assert_allclose(found[number][kept], refit, atol=1e-6)


def test_the_largest_contributions_are_kept() -> None:
    contributions = np.array([[5.0, 1, 4, 2, 3, 0, 0, 0, 0]] * EXPERTS)
    scales = np.linspace(1, 4, ATOMS)
    curvature = torch.diag(torch.from_numpy(scales**2)).float().repeat(EXPERTS, 1, 1)
    codes = contributions / scales
    found, _ = shrink_support(Quadratic(curvature, codes, np.zeros_like(codes)), codes, 3.0, 1.5)
    np.testing.assert_array_equal(found > 0, np.array([[True, False, True, False, True] + [False] * 4] * EXPERTS))
    np.testing.assert_allclose(found[found > 0], codes[found > 0], rtol=5e-3)


def test_an_expert_without_curvature_keeps_its_largest_code() -> None:
    curvature, codes, slope = quadratic(1)
    curvature[2] = 0
    slope[2] = 0
    model = Quadratic(curvature, codes, slope)
    grown = newton_codes(model)
    found, _ = shrink_support(model, grown, 2.0, 1.5)
    assert (found.max(1) > 0).all() and np.isfinite(found).all()
