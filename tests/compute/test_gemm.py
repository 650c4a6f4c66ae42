"""Batched products against fp64, in blocks that do not divide the width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from globe import kernels
from globe.compute import devices, gemm
from globe.errors import UsageError


@pytest.mark.parametrize("inner", [1, 5, 1 << 14])
def test_inner_products_are_summed_over_all_blocks(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_MPS_INNER", inner)
    rng = np.random.default_rng(0)
    bank, targets = rng.standard_normal((4, 3, 7)), rng.standard_normal((6, 3, 7))
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (bank, targets)]
    gram = gemm.bank_gram(tensors[0])
    np.testing.assert_allclose(gram, np.einsum("jrd,krd->jk", bank, bank), atol=1e-5)
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(
        gemm.correlations(tensors[1], tensors[0]), np.einsum("ird,jrd->ij", targets, bank), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_products_of_some_and_of_pairs(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    places = rng.random((6, 4)) * (rng.random((6, 4)) < 0.5)
    bank, targets = (torch.from_numpy(rng.standard_normal((n, 3, 700))).to(dtype) for n in (4, 6))
    exact = np.einsum("ird,jrd->ij", targets.double(), bank.double())
    found = gemm.correlations_at(places, targets, bank)
    np.testing.assert_allclose(found, np.where(places != 0, exact, 0.0), atol=1e-3)
    if dtype == torch.float32:
        pairs = gemm.inner_products(bank, targets[:4].contiguous())
        np.testing.assert_allclose(pairs, exact[[0, 1, 2, 3], [0, 1, 2, 3]], atol=1e-3)
        assert not len(gemm.inner_products(bank[:0], bank[:0]))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_weighted_sums(count: int) -> None:
    weights, matrices = torch.arange(1.0, count + 1), torch.randn(count, 3, 7)
    torch.testing.assert_close(gemm.weighted_sum(weights, matrices), torch.einsum("n,nij->ij", weights, matrices))


@pytest.mark.parametrize("room", [None, 6, 9])
def test_mixtures(room: int | None) -> None:
    rng = np.random.default_rng(1)
    codes, bank = rng.random((6, 4)), rng.standard_normal((4, 3, 7)).astype(np.float32)
    out = None if room is None else torch.empty(room, 3, 7)
    found = gemm.mixtures(codes, torch.from_numpy(bank), out)
    np.testing.assert_allclose(found, np.einsum("ij,jrd->ird", codes, bank), atol=1e-5)
    assert out is None or found.data_ptr() == out.data_ptr()


def test_a_device_that_is_not_there_is_refused() -> None:
    assert devices.pick_device("cpu").type == "cpu"
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if there:
            assert devices.pick_device(name).type == name
        else:
            with pytest.raises(UsageError, match=f"device {name} is not available here; use --device auto or cpu"):
                devices.pick_device(name)


def test_fp32_refuses_every_bf16_product() -> None:
    cpu = torch.device("cpu")
    assert gemm.precision_report("fp32", cpu)["solver"] == "fp32"
    dots = kernels.available()["isa"].endswith("_bf16")
    assert gemm.precision_report("auto", cpu)["solver"] == ("bf16" if dots else "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [1, 3, 10])
def test_scattering_is_the_adjoint_of_mixing(room: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    codes = rng.random((6, 4)) * (rng.random((6, 4)) < 0.6)
    summands = torch.from_numpy(rng.standard_normal((6, 3, 7)).astype(np.float32)).to(dtype)
    total = torch.ones(4, 3, 7)
    gemm.scatter_add(codes, summands, total, torch.empty(room, 3, 7))
    np.testing.assert_allclose(total, 1 + np.einsum("ij,ird->jrd", codes, summands.double()), atol=1e-5)


@pytest.mark.parametrize("largest", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_matrices_stay_positive_definite_in_bf16(condition: float, largest: float) -> None:
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.standard_normal((90, 90)))[0]
    values = np.geomspace(1, 1 / condition, 90)
    values[0] = largest
    matrix = torch.from_numpy((basis * values) @ basis.T).float()[None]
    stored = gemm.storable(matrix.clone(), torch.bfloat16)
    assert float(torch.linalg.eigvalsh(stored[0].double()).min()) > 0
    assert float((stored.float() - matrix).norm() / matrix.norm()) < 2.0**-5
    assert torch.equal(gemm.storable(matrix.clone(), torch.float32), matrix)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_grams_are_symmetric_products(kind: torch.dtype) -> None:
    matrices = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(5)).to(kind)
    found = gemm.grams(matrices)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, matrices.double() @ matrices.double().mT, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, found.mT)
