"""Weights of every size: mixed dtypes, wild values, families far from one, and exports that saturate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import calibrate_tiny, make_tiny
from families import WEIGHTS_ONLY, planted, write_checkpoint
from globe import GlobeError, Settings, UsageError, compress, export
from globe.checkpoint.index import Checkpoint
from globe.seeds import METHODS
from globe.seeds.proxies import split_rows

SMALL: dict[str, Any] = {"rank": 8, "bank_size": 4, "outer_loops": 2, "families": ("gate",), **WEIGHTS_ONLY}
EXPERTS, P, D = 12, 24, 32
TENSOR = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


def model(
    directory: Path, change: Callable[[np.ndarray], Any] = lambda weights: None, dtype: Any = torch.float32
) -> Path:
    weights = planted(0, experts=EXPERTS, p=P, d=D, rank=8, atoms=4, noise=0.1)
    change(weights)
    others = planted(1, experts=EXPERTS, p=P, d=D, rank=8, atoms=4, noise=0.1)
    return write_checkpoint(directory, dtype, gate=weights, up=others, down=others.transpose(0, 2, 1))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def errors(metrics: dict[str, Any]) -> list[float]:
    found: list[float] = metrics["families"]["gate"]["expert_errors"]
    return found


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_few_experts_of_another_dtype(calibrated: bool, tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    names = [f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight" for layer, expert in ((0, 1), (2, 3))]

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]] = tensors[names[0]].float()
        tensors[names[1]] = tensors[names[1]].half()

    edit(source, widen)
    given = {**SMALL, "calibrate": "none"}
    if calibrated:
        given["calibrate"] = str(calibrate_tiny(source, tmp_path / "statistics.safetensors").path)
    metrics = compress(source, tmp_path / "out", Settings(**given)).metrics
    gates = [info for name, info in Checkpoint(source).tensors.items() if "experts" in name and "gate" in name]
    assert metrics["bytes"]["touched"] == sum(info.nbytes for info in gates)
    export(tmp_path / "out", tmp_path / "dense")
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "dense"))
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    assert all(value.isfinite().all() for value in after.values())
    widened = compress(plain(source, tmp_path / "plain"), tmp_path / "plain-out", Settings(**{**SMALL})).metrics
    if not calibrated:  # converting as they are read is converting before
        np.testing.assert_allclose(errors(metrics), errors(widened), rtol=1e-5)


def plain(source: Path, target: Path) -> Path:
    """The same with every expert in fp32."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    edit(target, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if "gate_proj" in n}))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-110, -66, -17, -1, 15, 50, 100])
def test_nothing_depends_on_the_scale_of_the_weights(exponent: int, dtype: torch.dtype, tmp_path: Path) -> None:
    made = []
    for name, power in (("plain", 0), ("scaled", exponent)):
        source = model(tmp_path / name, lambda weights, power=power: weights.__imul__(2.0**power), dtype)
        result = compress(source, tmp_path / f"{name}-out", Settings(**SMALL))
        export(tmp_path / f"{name}-out", tmp_path / f"{name}-dense")
        made.append((result.metrics, load_file(tmp_path / f"{name}-dense" / "model.safetensors")))
    (first, before), (second, after) = made
    assert errors(second) == pytest.approx(errors(first), rel=1e-5)
    families = [metrics["families"]["gate"] for metrics in (first, second)]
    assert families[0]["atom_popularity"] == families[1]["atom_popularity"]
    name = TENSOR.format(0, 3)
    unscaled = after[name].double() * 2.0**-exponent
    torch.testing.assert_close(unscaled, before[name].double(), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_every_method_seeds_weights_of_any_size(method: str, size: float, tmp_path: Path) -> None:
    found = []
    for scale in (1.0, size):
        source = model(tmp_path / f"source-{scale:g}", lambda weights, scale=scale: weights.__imul__(scale))
        settings = Settings(**{**SMALL, "method": method, "outer_loops": 1})
        found.append(compress(source, tmp_path / f"out-{scale:g}", settings).metrics["families"]["gate"])
    assert found[1]["relative_error"] == pytest.approx(found[0]["relative_error"], rel=0.02)


@pytest.mark.parametrize("solver", ["alternate", "joint"])
@pytest.mark.parametrize("value", [1e10, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wild_weight_is_named(value: float, solver: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def spoil(weights: np.ndarray) -> None:
        weights[7, 5, 3] = -value

    source = model(tmp_path / "source", spoil, dtype)
    with pytest.raises(GlobeError) as refused:
        compress(source, tmp_path / "out", Settings(**{**SMALL, "solver": solver}))
    line = str(refused.value)
    assert TENSOR.format(1, 1) in line and "row 5" in line
    assert float(re.search(r"holds (\S+) in", line)[1]) == pytest.approx(-value, rel=1e-2)  # type: ignore[index]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1e3, 1e9])
def test_an_expert_far_larger_than_the_others(factor: float, tmp_path: Path) -> None:
    source = model(tmp_path / "source", lambda weights: weights[4].__imul__(factor))
    if factor > 2**20:
        with pytest.raises(GlobeError, match=r"experts\.4\.gate_proj\.weight .* holds "):
            compress(source, tmp_path / "out", Settings(**SMALL))
    else:
        metrics = compress(source, tmp_path / "out", Settings(**SMALL)).metrics
        assert all(math.isfinite(error) for error in errors(metrics))


def test_fp16_at_its_end_is_saturated_and_counted(tmp_path: Path) -> None:
    def raise_some(weights: np.ndarray) -> None:
        weights *= 5e3
        weights[2, 3] = 65504 * np.sign(weights[2, 3])
        np.clip(weights, -65504, 65504, out=weights)

    source = model(tmp_path / "source", raise_some, torch.float16)
    lines: list[str] = []
    compress(source, tmp_path / "out", Settings(**{**SMALL, "rank": 4, "bank_size": 2}))
    told = export(tmp_path / "out", tmp_path / "dense", progress=_Lines(lines))
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(value.isfinite().all() for value in exported.values())
    at_the_end = sum(int((value.abs() == 65504).sum()) for name, value in exported.items() if "gate" in name)
    assert 0 < told["saturated"] <= at_the_end
    assert any(f"{told['saturated']:,} values" in line for line in lines)


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self.log = lines.append

    def stage(self, name: str, total: float) -> Any:
        from contextlib import nullcontext

        return nullcontext(lambda steps: None)


@pytest.mark.parametrize("options", [{"bank_size": 0}, {"ratio": 0.01}, {"bank_size": 10**6}])
def test_no_remedy_is_impossible(options: dict[str, Any], tmp_path: Path) -> None:
    source = model(tmp_path / "source", lambda weights: weights.__imul__(1e-20))
    with pytest.raises(UsageError) as refused:
        compress(
            source, tmp_path / "out", Settings(**{**{k: v for k, v in SMALL.items() if k != "bank_size"}, **options})
        )
    assert "0 or less" not in str(refused.value) and "--bank-size 0" not in str(refused.value)


def test_metrics_are_json_without_nan(tmp_path: Path) -> None:
    source = model(tmp_path / "source", lambda weights: weights.__imul__(1e-30))
    compress(source, tmp_path / "out", Settings(**SMALL))
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_zero_proxies_of_experts_that_are_not_zero_have_a_remedy_that_works(tmp_path: Path) -> None:
    settings = Settings(**{**SMALL, "selector": "uniform", "bank_size": 2})
    proxy = split_rows(P, 8, np.ones(P), settings).proxy
    source = model(tmp_path / "source", lambda weights: weights.__setitem__((slice(None), proxy), 0))
    with pytest.raises(GlobeError, match="use --method grouped-subspace"):
        compress(source, tmp_path / "out", settings)
    compress(source, tmp_path / "out", replace(settings, method="grouped-subspace"))
