"""Products with packed matrices, by the kernel and with their values."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from globe.checkpoint.formats.packed import PACKED, SCALE, Packing, pack  # noqa: E402
from globe.hf import packed as module  # noqa: E402
from globe.hf.banks import register_packed  # noqa: E402
from globe.hf.packed import packed_linear  # noqa: E402


def _packed(bits: int) -> tuple[Any, Packing, Any]:
    """A module with two packed matrices (40, 64), and their values."""
    draw, packing, held = torch.Generator().manual_seed(bits), Packing(bits, 32), torch.nn.Module()
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 40, 64), generator=draw, dtype=torch.int8)
    scales = (torch.rand(2, 40, 2, generator=draw) - 0.5).bfloat16()
    words = pack(codes, bits)
    register_packed(held, "left", tuple(words.shape), tuple(scales.shape))
    held.get_buffer("left" + PACKED).copy_(words)
    held.get_buffer("left" + SCALE).copy_(scales)
    return held, packing, codes.float() * scales.float().repeat_interleave(32, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_are_those_of_the_values(bits: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, packing, values = _packed(bits)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls: list[Any] = []
    kernel = module.qmatmul
    monkeypatch.setattr(module, "qmatmul", lambda *given, **told: calls.append(given) or kernel(*given, **told))
    found = packed_linear(x, held, "left", 1, packing)
    assert found.dtype == dtype and len(calls) == (bits != 3 and dtype != torch.float32)
    wanted = x.float() @ values[1].mT
    assert float((found.float() - wanted).norm() / wanted.norm()) < (2e-3 if dtype != torch.bfloat16 else 8e-3)


def test_gradients_go_through_the_values() -> None:
    held, packing, values = _packed(4)
    x = torch.randn(3, 64, requires_grad=True)
    packed_linear(x, held, "left", 0, packing).sum().backward()
    torch.testing.assert_close(x.grad, values[0].sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert packed_linear(torch.empty(0, 64), held, "left", 0, packing).shape == (0, 40)
