"""Batched products against fp64, in blocks that do not divide the width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from globe import gemm
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


@pytest.mark.parametrize("room", [None, 6, 9])
def test_mixtures(room: int | None) -> None:
    rng = np.random.default_rng(1)
    codes, bank = rng.random((6, 4)), rng.standard_normal((4, 3, 7)).astype(np.float32)
    out = None if room is None else torch.empty(room, 3, 7)
    found = gemm.mixtures(codes, torch.from_numpy(bank), out)
    np.testing.assert_allclose(found, np.einsum("ij,jrd->ird", codes, bank), atol=1e-5)
    assert out is None or found.data_ptr() == out.data_ptr()


def test_a_device_that_is_not_there_is_refused() -> None:
    assert gemm.pick_device("cpu").type == "cpu"
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if there:
            assert gemm.pick_device(name).type == name
        else:
            with pytest.raises(UsageError, match=f"device {name} is not available here; use --device auto or cpu"):
                gemm.pick_device(name)
