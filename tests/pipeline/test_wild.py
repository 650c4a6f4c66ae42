"""Weights of any scale and of several dtypes: a result that does not depend on the scale, or one line at the scan."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import calibrate_tiny, make_tiny
from families import WEIGHTS_ONLY, planted, write_checkpoint
from globe.artifact.export import export
from globe.checkpoint.powers import saturated, shared, times_power
from globe.choice.inspect import inspect
from globe.errors import GlobeError, UsageError
from globe.pipeline.compress import compress
from globe.seeds import METHODS
from globe.seeds.proxies import split_rows
from globe.settings import Settings

SIZES: dict[str, Any] = {"rank": 4, "bank_size": 3, "families": ("gate",), "outer_loops": 1, "support": 2}
WEIGHTS = planted(3, experts=8, p=12, d=20, rank=4, atoms=3, noise=0.3) / 16


def source(directory: Path, weights: np.ndarray[Any, Any], dtype: torch.dtype = torch.float32) -> Path:
    return write_checkpoint(directory, dtype, gate=weights, up=WEIGHTS, down=WEIGHTS.swapaxes(1, 2))


def settings(**changes: Any) -> Settings:
    return Settings(**{**WEIGHTS_ONLY, **SIZES, **changes})


def run(directory: Path, out: Path, chosen: Settings) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """The family's metrics, the dense export's tensors, and what export says."""
    found = compress(directory, out, chosen).metrics["families"]["gate"]
    told = export(out, out.with_name(out.name + "-dense"))
    return found, load_file(out.with_name(out.name + "-dense") / "model.safetensors"), told


@pytest.mark.parametrize("solver", ["alternate", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_depends_on_the_scale(dtype: torch.dtype, solver: str, tmp_path: Path) -> None:
    rounded = torch.from_numpy(WEIGHTS).to(dtype).double().numpy()
    chosen = settings(solver=solver, joint_steps=3)
    usual, dense, _ = run(source(tmp_path / "0", rounded, dtype), tmp_path / "out-0", chosen)
    codes = load_file(tmp_path / "out-0" / "globe-bank.safetensors")["globe.gate.codes.values"]
    for k in (-100, -66, -10, 12, 50, 100):
        scaled = source(tmp_path / str(k), rounded * 2.0**k, dtype)
        found, other, _ = run(scaled, tmp_path / f"out-{k}", chosen)
        bank = load_file(tmp_path / f"out-{k}" / "globe-bank.safetensors")
        assert torch.equal(bank["globe.gate.codes.values"], codes), k
        assert found["relative_error"] == usual["relative_error"], k
        for name in (name for name in dense if "gate" in name):
            assert torch.equal(other[name].double(), dense[name].double() * 2.0**k), (k, name)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_every_method_at_1e_minus_20(method: str, tmp_path: Path) -> None:
    found, dense, _ = run(source(tmp_path / "s", WEIGHTS * 1e-20), tmp_path / "out", settings(method=method))
    assert 0 < found["relative_error"] < 1
    assert all(bool(tensor.isfinite().all()) for tensor in dense.values())


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e15, 1e36])
def test_far_scales(scale: float, tmp_path: Path) -> None:
    found, _, _ = run(source(tmp_path / "s", WEIGHTS * scale), tmp_path / "out", settings())
    usual, _, _ = run(source(tmp_path / "u", WEIGHTS), tmp_path / "usual", settings())
    assert found["relative_error"] == pytest.approx(usual["relative_error"], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e10, -1e20, 1e30, 3e38])
def test_a_wild_value_is_named_at_the_scan(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = WEIGHTS.copy()
    weights[5, 3, 7] = value
    with pytest.raises(GlobeError, match=r"layers\.1\.mlp\.experts\.1\.gate_proj.*row 3") as caught:
        compress(source(tmp_path / "s", weights, dtype), tmp_path / "out", settings())
    assert f"{float(torch.tensor(value).to(dtype)):g}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wild_expert_is_named_at_the_scan(tmp_path: Path) -> None:
    weights = WEIGHTS.copy()
    weights[2] *= 1e9
    with pytest.raises(GlobeError, match=r"layers\.0\.mlp\.experts\.2\.gate_proj"):
        compress(source(tmp_path / "s", weights), tmp_path / "out", settings())


@pytest.mark.parametrize(("method", "solver"), [*((m, "alternate") for m in [*METHODS, "auto"]), ("ts-pca", "joint")])
@pytest.mark.parametrize("kind", ["value", "expert"])
def test_just_below_wild_gives_a_result(kind: str, method: str, solver: str, tmp_path: Path) -> None:
    weights = WEIGHTS.copy()
    weights[(5, 3, 7) if kind == "value" else 5] *= 1e5
    chosen = settings(method=method, solver=solver, joint_steps=2)
    found, dense, _ = run(source(tmp_path / "s", weights), tmp_path / "out", chosen)
    assert 0 <= found["relative_error"] < 1
    assert all(bool(tensor.isfinite().all()) for tensor in dense.values())


def mix(directory: Path, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Keep some experts of a bf16 checkpoint in another dtype."""
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if ".0.gate_proj" in name or ".2.down_proj" in name:
            tensors[name] = tensors[name].to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.dtype for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("method", "dtype"), [*((m, torch.float32) for m in [*METHODS, "auto"]), ("ts-pca", torch.float16)]
)
def test_experts_in_several_dtypes(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = source(tmp_path / "s", WEIGHTS, torch.bfloat16)
    dtypes = mix(directory, dtype)
    chosen = settings(method=method, families=("gate", "up", "down"))
    _, dense, _ = run(directory, tmp_path / "out", chosen)
    assert {name: tensor.dtype for name, tensor in dense.items()} == dtypes
    stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for told in (metrics["bytes"], inspect(directory, chosen)["bytes"]):
        assert told["touched"] == told["experts"] == stored


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("tiny") / "source", dtype="float32")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e15])
@pytest.mark.parametrize("which", ["gate_proj", "proj"])
def test_in_a_metric(which: str, scale: float, tiny: Path, tmp_path: Path) -> None:
    if which == "proj" and scale > 1:
        scale = 1e3  # the model itself must run
    directory = Path(shutil.copytree(tiny, tmp_path / "s"))
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if ".experts." in name and which in name:
            tensors[name] = tensors[name] * scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    calibrate_tiny(directory, tmp_path / "statistics")
    changes = {"solver": "joint", "joint_steps": 2, "calibrate": str(tmp_path / "statistics")}
    out = tmp_path / "out"
    found = compress(directory, out, settings(**changes, rank=0.5, families=("gate", "up", "down"))).metrics["families"]
    for family in found.values():
        assert 0 < family["weighted_error"] < 1
    export(out, tmp_path / "dense")
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "dense" / "model.safetensors").values())


def test_an_export_saturates_and_says_how_many(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).choice([-65504.0, 65504.0], (8, 12, 20))
    _, dense, told = run(source(tmp_path / "s", weights, torch.float16), tmp_path / "out", settings())
    gates = [tensor for name, tensor in dense.items() if "gate" in name]
    assert all(bool(tensor.isfinite().all()) for tensor in gates)
    assert told["saturated"] > 0
    assert told["saturated"] <= sum(int((tensor.abs() == 65504).sum()) for tensor in gates)


def test_powers() -> None:
    for k in (-140, -100, 0, 7, 120):
        assert float(times_power(torch.tensor(1.0), k)) == 2.0**k
        assert sum(shared(k)) == k and all(abs(part) <= 70 for part in shared(k))
    values, count = saturated(torch.tensor([1e6, -1e6, 1.0, float("nan")]), torch.float16)
    assert count == 2 and values[:3].tolist() == [65504.0, -65504.0, 1.0] and bool(values[3].isnan())


def test_zero_proxies_of_experts_that_are_not_zero_have_a_remedy_that_works(tmp_path: Path) -> None:
    chosen = settings(selector="uniform", bank_size=2, method="ts-pca")
    weights = WEIGHTS.copy()
    weights[:, split_rows(12, 4, np.ones(12), chosen).proxy] = 0
    directory = source(tmp_path / "s", weights)
    with pytest.raises(GlobeError, match="use --method grouped-subspace"):
        compress(directory, tmp_path / "out", chosen)
    compress(directory, tmp_path / "out", replace(chosen, method="grouped-subspace"))


@pytest.mark.parametrize("options", [{"bank_size": 0}, {"ratio": 0.01}, {"bank_size": 10**6}])
def test_no_remedy_is_impossible(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        compress(source(tmp_path / "s", WEIGHTS * 1e-20), tmp_path / "out", settings(**{"bank_size": None, **options}))
    assert "0 or less" not in str(refused.value) and "--bank-size 0" not in str(refused.value)


@pytest.mark.parametrize("solver", ["alternate", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-20, 1e-30])
def test_a_faint_expert_is_fitted_too(scale: float, dtype: torch.dtype, solver: str, tmp_path: Path) -> None:
    weights = WEIGHTS.copy()
    weights[5] *= scale
    directory = source(tmp_path / "s", weights, dtype)
    found, dense, _ = run(directory, tmp_path / "out", settings(solver=solver, joint_steps=2))
    assert 0 < found["relative_error"] < 1 and 0 < found["expert_errors"][5] < 1
    name = "model.layers.1.mlp.experts.1.gate_proj.weight"
    before, after = (tensors[name].double() for tensors in (load_file(directory / "model.safetensors"), dense))
    assert float(torch.linalg.norm(after - before) / torch.linalg.norm(before)) < 1
