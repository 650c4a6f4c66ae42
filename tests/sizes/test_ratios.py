"""Ratios against bytes counted in files, and what the metrics say of stored factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import WEIGHTS_ONLY, Array, planted, write_checkpoint
from globe import Settings, compress
from globe.artifact.factored import csr_parts
from globe.checkpoint.family import Family
from globe.checkpoint.formats.packed import Packing, packed
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import FileHeader, read_header, read_tensor
from globe.sizes.ratios import Shape, Storage, ratios, stored_bytes, stored_elements

EXPERTS, P, D = 12, 24, 20


@given(experts=st.integers(1, 40), atoms=st.integers(1, 12), rank=st.integers(1, 8), seed=st.integers(0, 1000))
def test_stored_elements_are_half_the_stored_bytes(experts: int, atoms: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.random((experts, atoms)) * (rng.random((experts, atoms)) < 0.5)
    family = Family("gate", (None,) * experts, P, D)  # type: ignore[arg-type]
    stored = [torch.empty(experts, P, rank).bfloat16(), torch.empty(atoms, rank, D).bfloat16()]
    nbytes = sum(tensor.nbytes for tensor in [*stored, *csr_parts(codes).values()])
    assert stored_elements(family, Shape(rank, atoms, int(np.count_nonzero(codes)))) == nbytes / 2


RANKS, PACKINGS = st.sampled_from([4, 8, 12]), st.sampled_from([None, Packing(8, 4), Packing(4, 2), Packing(3, 4)])


@given(
    experts=st.integers(1, 9), atoms=st.integers(1, 5), rank=st.sampled_from([4, 8, 12]), lefts=PACKINGS, bank=PACKINGS
)
def test_packed_factors_count_for_their_bytes(
    experts: int, atoms: int, rank: int, lefts: Packing | None, bank: Packing | None
) -> None:
    family = Family("gate", (None,) * experts, P, D)  # type: ignore[arg-type]
    nbytes = 4 * (experts + 1)
    for packing, shape in ((lefts, (experts, P, rank)), (bank, (atoms, rank, D))):
        values = torch.zeros(shape, dtype=torch.int8)
        if packing is None:
            nbytes += 2 * values.numel()
        else:
            scales = torch.ones(*shape[:2], shape[2] // packing.group)
            nbytes += sum(tensor.nbytes for tensor in packed("name", values, scales, packing.bits).values())
    shape = Shape(rank, atoms, 0, Storage(lefts, bank))
    assert stored_bytes(family, shape) == nbytes and stored_elements(family, shape) == -(-nbytes // 2)


@given(seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_sparse_codes_come_back(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.random((9, 7)).astype(np.float32).astype(np.float64) * (rng.random((9, 7)) < density)
    parts = {name.removeprefix("codes."): tensor.numpy() for name, tensor in csr_parts(codes).items()}
    assert {part: array.dtype.name for part, array in parts.items()} == {
        "indptr": "int32",
        "indices": "int32",
        "values": "float32",
    }
    again = np.zeros_like(codes)
    for row in range(9):
        span = slice(*parts["indptr"][row : row + 2])
        again[row, parts["indices"][span]] = parts["values"][span]
    np.testing.assert_array_equal(again, codes)


def experts(seed: int) -> Array:
    return planted(seed, experts=EXPERTS, p=P, d=D, rank=8, atoms=4, noise=0.2)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    down = experts(3).transpose(0, 2, 1)
    return write_checkpoint(
        tmp_path_factory.mktemp("ratios") / "source", request.param, gate=experts(1), up=experts(2), down=down
    )


@pytest.fixture(scope="module", params=[("gate",), ("gate", "up")], ids=["gate", "both"])
def made(source: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("made") / "out"
    small: dict[str, Any] = {"rank": 8, "bank_size": 4, "outer_loops": 2, "support": 3, **WEIGHTS_ONLY}
    settings = Settings(**small, families=request.param, device="cpu")
    return out, compress(source, out, settings)


def headers(directory: Path) -> list[FileHeader]:
    return [read_header(file) for file in sorted(directory.glob("*.safetensors"))]


def test_ratios_are_those_of_the_stored_tensors(source: Path, made: tuple[Path, Any]) -> None:
    out, result = made
    touched = tuple(result.metrics["families"])
    before = {name: info.nbytes for header in headers(source) for name, info in header.tensors.items()}
    width = 4 if next(iter(headers(source)[0].tensors.values())).dtype == "F32" else 2
    dense = sum(size for name, size in before.items() if any(f".{family}_proj." in name for family in touched))
    ours = sum(
        info.nbytes for header in headers(out) for name, info in header.tensors.items() if "globe" in name
    )  # bf16, whatever the source's dtype: the ratio counts weights of equal precision
    assert result.ratio.touched == pytest.approx((ours / 2) / (dense / width), rel=1e-9)
    rest = sum(before.values()) - dense
    assert result.ratio.experts == result.ratio.checkpoint
    assert result.ratio.checkpoint == pytest.approx((ours / 2 + rest / width) / (sum(before.values()) / width))
    counted = result.metrics["bytes"]
    assert counted["touched"] == dense
    assert counted["experts"] == counted["checkpoint"] == sum(before.values())
    assert counted["stored"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["bytes"] == counted


def test_the_planned_ratio_counts_the_target_support(source: Path) -> None:
    checkpoint = Checkpoint(source)
    families = {name: checkpoint.family(name) for name in ("gate", "up")}
    shape = Shape(8, 4, 3 * EXPERTS)
    found = ratios(checkpoint, families, dict.fromkeys(families, shape))
    stored = EXPERTS * P * 8 + 4 * 8 * D + 4 * 3 * EXPERTS + 2 * (EXPERTS + 1)
    assert found.touched == pytest.approx(stored / (EXPERTS * P * D))
    assert found.experts == pytest.approx((2 * stored + EXPERTS * P * D) / (3 * EXPERTS * P * D))


def test_metrics_of_stored_factors_are_those_of_the_files(made: tuple[Path, Any]) -> None:
    out, result = made
    stored = {name: read_tensor(info) for header in headers(out) for name, info in header.tensors.items()}
    for name, family in result.metrics["families"].items():
        atoms = stored[f"globe.{name}.atoms"].double().numpy().reshape(4, -1)
        norms = np.linalg.norm(atoms, axis=1)
        unit = atoms / norms[:, None]
        off = unit @ unit.T - np.eye(4)
        assert family["atom_norm_max_deviation"] == pytest.approx(np.abs(norms - 1).max(), abs=1e-6)
        assert family["coherence"] == pytest.approx(np.linalg.norm(off), abs=1e-6)
        assert family["coherence_max"] == pytest.approx(np.abs(off).max(), abs=1e-6)
        sizes = np.diff(stored[f"globe.{name}.codes.indptr"].numpy())
        assert family["support_median"] == np.median(sizes)
        assert family["support_histogram"] == np.bincount(sizes, minlength=5).tolist()
        used = stored[f"globe.{name}.codes.indices"].numpy()
        assert family["atom_popularity"] == np.bincount(used, minlength=4).tolist()
        assert len(family["expert_errors"]) == EXPERTS
