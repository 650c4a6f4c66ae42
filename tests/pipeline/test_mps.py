"""The path of a run on MPS, with every operation checked against torch's table of MPS kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import make_tiny
from fake_mps import MPS, FakeMps, OnMps, kernels_of_mps
from families import CPU, WEIGHTS_ONLY
from globe import Settings, calibrate, compress
from globe.compute import devices
from globe.compute.spd import gram_inverse, row_basis
from globe.errors import GlobeError
from globe.seeds import METHODS

TEXT = "A mixture holds many experts; a router chooses a few of them for every token. " * 8


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> FakeMps:
    monkeypatch.setattr(sys.modules["globe.choice.plan"], "pick_device", lambda name: MPS if name == "mps" else CPU)
    return FakeMps()


def test_the_table_knows_what_is_missing() -> None:
    runs = kernels_of_mps()
    assert runs["mm"] and runs["addmm_"] and runs["topk"]
    assert not any(runs[name] for name in ("_linalg_eigh", "geqrf", "_linalg_svd"))


def test_float64_and_missing_kernels_are_refused_there(mps: FakeMps) -> None:
    with mps:
        there = torch.randn(4, 4).to(MPS)
        assert isinstance(there, OnMps) and there.device.type == "mps"
        np.testing.assert_allclose((there @ there).cpu(), there.cpu() @ there.cpu())
        with pytest.raises(TypeError, match="MPS has no torch.float64"):
            there.double()
        with pytest.raises(AssertionError, match="has no MPS kernel"):
            torch.linalg.eigh(there)
        with pytest.raises(AssertionError, match="mixes tensors of MPS and of the CPU"):
            there @ torch.ones(4, 4)


@pytest.mark.parametrize(
    ("method", "mod"), [*((method, "exact") for method in METHODS), ("ts-pca", "aligned"), ("ts-pca", "fixed")]
)
def test_a_run_takes_only_what_mps_has(method: str, mod: str, mps: FakeMps, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    small = {"rank": 0.5, "bank_size": 3, "outer_loops": 2, "mod": mod, "method": method, **WEIGHTS_ONLY}
    with mps:
        found = compress(source, tmp_path / "mps", Settings(device="mps", **small))  # type: ignore[arg-type]
    assert {"mm", "_to_copy"} <= mps.seen
    here = compress(source, tmp_path / "cpu", Settings(device="cpu", precision="fp32", **small))  # type: ignore[arg-type]
    for name, family in here.metrics["families"].items():
        there = found.metrics["families"][name]
        assert there["relative_error"] == pytest.approx(family["relative_error"], rel=0.05)


@pytest.mark.parametrize("codes", ["entmax", "signed"])
@pytest.mark.parametrize("metric", ["weights", "calibrated"])
def test_the_joint_fit_takes_only_what_mps_has(metric: str, codes: str, mps: FakeMps, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    small: dict[str, Any] = {"rank": 0.5, "bank_size": 3, "outer_loops": 1, "joint_steps": 2, "support": 2}
    small |= {"families": ("gate", "down"), "codes": codes, "calibrate": "none"}
    if metric == "calibrated":
        small["calibrate"] = str(calibrate(source, tmp_path / "statistics", text=TEXT, tokens=512, window=64).path)
    with mps:
        found = compress(source, tmp_path / "mps", Settings(device="mps", **small)).metrics["families"]
    assert {"mm", "dot", "linalg_vector_norm"} <= mps.seen
    here = compress(source, tmp_path / "cpu", Settings(device="cpu", **small)).metrics["families"]
    for name, family in here.items():
        for key in ("relative_error", "weighted_error"):
            assert found[name][key] == (family[key] and pytest.approx(family[key], rel=0.05))


def test_packed_factors_take_only_what_mps_has(mps: FakeMps, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    small: dict[str, Any] = {
        "rank": 32,
        "bank_size": 3,
        "joint_steps": 1,
        "left_bits": 4,
        "atom_bits": 4,
        **WEIGHTS_ONLY,
    }
    with mps:
        found = compress(source, tmp_path / "mps", Settings(device="mps", **small)).metrics["families"]
    here = compress(source, tmp_path / "cpu", Settings(device="cpu", **small)).metrics["families"]
    for name, family in here.items():
        assert found[name]["relative_error"] == pytest.approx(family["relative_error"], rel=0.05)


def test_a_device_that_multiplies_wrongly_ends_the_run(mps: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    right = devices.matmul
    with mps:
        devices.check_device(MPS)
        monkeypatch.setattr(devices, "matmul", lambda left, other: right(left[..., :-50], other[..., :-50, :]))
        with pytest.raises(GlobeError, match="is off by .* of its norm, expected rounding"):
            devices.check_device(MPS)


def test_a_device_that_factorises_wrongly_or_not_at_all_ends_the_run(
    mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = devices.gram_inverse

    def wrong(*given: Any) -> tuple[torch.Tensor, ...]:
        return 1.01 * right(*given)[0], *right(*given)[1:]

    def missing(*given: Any) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError("aten::linalg_cholesky_ex.L")

    with mps:
        monkeypatch.setattr(devices, "gram_inverse", wrong)
        with pytest.raises(GlobeError, match="the inverse of a 64 × 64 matrix is off by .* of its norm"):
            devices.check_device(MPS)
        monkeypatch.setattr(devices, "gram_inverse", missing)
        with pytest.raises(GlobeError, match=r"torch .* has no Cholesky factors there.* or use --device cpu$"):
            devices.check_device(MPS)


def test_factors_and_bases_stay_on_the_device(mps: FakeMps) -> None:
    with mps:
        inner, basis, ridged = row_basis(torch.randn(3, 8, 20).to(MPS), 1e-6, 1e-10)
        inverses, products, _ = gram_inverse(torch.randn(3, 8, 20).to(MPS), 1e-6, 1e-5)
    assert all(isinstance(found, OnMps) for found in (inner, basis, ridged, inverses, products))
    assert not {"_local_scalar_dense", "equal"} & mps.seen
