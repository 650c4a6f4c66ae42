"""The pretrained SmolLM2 mixture, whose errors a prototype has shown within reach (gate family, r = 288, m = 30)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from globe import evaluate, export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = (
    "--families gate --rank 288 --bank-size 30 --codes nnls --method ts-pca --outer-loops 12 --device cpu "
    "--solver alternate --calibrate none"
)
TOKENS = 2048
# A child's ru_maxrss begins with its parent's, so a small process between starts the command: it prints the peak.
MEASURED = """
import os, subprocess, sys
with open(sys.argv[1], "wb") as stdout:
    process = subprocess.Popen(sys.argv[2:], stdout=stdout)
    _, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Made:
    """A finished `globe compress`: its directory, its JSON, the peak resident memory of its process."""

    out: Path
    metrics: dict[str, Any]
    peak_bytes: int


@pytest.fixture(scope="module")
def made(smollm2_mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "globe", "compress", smollm2_mixture, root / "out", *OPTIONS.split()]
    measured = [sys.executable, "-c", MEASURED, root / "stdout", *command, "--json", "-q"]
    peak = int(subprocess.run(measured, check=True, capture_output=True, text=True).stdout)
    peak *= 1 if sys.platform == "darwin" else 1024
    return Made(root / "out", json.loads((root / "stdout").read_text(encoding="utf-8")), peak)


@pytest.fixture(scope="module")
def dense(made: Made) -> Path:
    target = made.out.parent / "dense"
    export(made.out, target)
    return target


@pytest.fixture(scope="module")
def bank(made: Made) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    stored = load_file(made.out / "globe-bank.safetensors")
    return {name.removeprefix("globe.gate."): tensor.float().numpy() for name, tensor in stored.items()}


def test_relative_error(made: Made) -> None:
    gate = made.metrics["families"]["gate"]
    assert (gate["rank"], gate["bank"]) == (288, 30)
    errors = [record["relative_error"] for record in gate["history"]]
    print("relative errors:", gate["init"]["relative_error"], *errors, "stored:", gate["relative_error"])
    assert errors[5] <= 0.16
    assert errors[11] <= 0.135
    assert gate["relative_error"] <= 0.135
    assert gate["relative_error"] == pytest.approx(min(errors), rel=1e-3)


def test_codes_are_not_negative_and_no_expert_is_empty(bank: dict[str, np.ndarray]) -> None:  # type: ignore[type-arg]
    assert bank["codes.values"].min() > 0
    assert len(bank["codes.indptr"]) == 121
    assert np.diff(bank["codes.indptr"]).min() >= 1


def test_peak_memory(made: Made) -> None:
    print("peak RSS:", made.peak_bytes / 2**30, "GiB;", made.metrics["stages"])
    assert made.peak_bytes <= 3 << 30
    assert made.metrics["stages"][-1]["peak_rss_bytes"] == pytest.approx(made.peak_bytes, rel=0.05)


def test_the_ratio_is_that_of_the_prototype(made: Made) -> None:
    assert made.metrics["ratio"]["touched"] == pytest.approx(0.688, abs=1e-3)


@pytest.fixture(scope="module")
def unrounded(made: Made, dense: Path, bank: dict[str, np.ndarray]) -> Path:  # type: ignore[type-arg]
    """The factored model with A_i Σ_j α_ij B_j in fp32, from the stored factors by NumPy."""
    target = made.out.parent / "unrounded"
    shutil.copytree(dense, target, ignore=shutil.ignore_patterns("*.safetensors"))
    codes = np.zeros((120, 30), np.float32)
    for number in range(120):
        span = slice(*bank["codes.indptr"][number : number + 2].astype(int))
        codes[number, bank["codes.indices"][span].astype(int)] = bank["codes.values"][span]
    manifest = json.loads((made.out / "globe.json").read_text(encoding="utf-8"))
    numbers = manifest["families"]["gate"]["tensors"]
    assert len(numbers) == 120
    for file in sorted(dense.glob("*.safetensors")):
        tensors = load_file(file)
        factors = load_file(made.out / file.name.replace("model", "globe", 1))
        for name in set(tensors) & set(numbers):
            mixture = np.tensordot(codes[numbers[name][0]], bank["atoms"], 1)
            product = factors[f"{name}.globe_gate_left"].float().numpy() @ mixture
            np.testing.assert_allclose(tensors[name].float().numpy(), product, rtol=2**-8, atol=1e-6)
            tensors[name] = torch.from_numpy(product)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return target


def test_the_dense_export_speaks_like_the_factored_model(
    made: Made, dense: Path, unrounded: Path, smollm2_mixture: Path
) -> None:
    same = evaluate(made.out, against=unrounded, max_tokens=TOKENS)
    rounded = evaluate(dense, against=unrounded, max_tokens=TOKENS)
    moved = evaluate(dense, against=smollm2_mixture, max_tokens=TOKENS)
    print("factored against its fp32 products:", same)
    for name, found in (("fp32 products", rounded), ("source", moved)):
        print(f"dense export against {name}:", found)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.perplexity == pytest.approx(same.reference_perplexity, rel=1e-5)
    assert rounded.kl is not None and rounded.top1_agreement is not None and moved.kl is not None
    assert 0 < rounded.kl < 2e-4  # bf16 rounding of the products, and nothing else
    assert rounded.top1_agreement > 0.98
    assert moved.kl > 100 * rounded.kl
