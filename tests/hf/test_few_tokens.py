"""A few tokens in one native call: as the products in Python, and only where these may be replaced."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_hf_experts import EXPERTS, RANK, SIZE, WIDTH, Dense, make_banks  # noqa: E402
from torch import nn  # noqa: E402

from globe import _native  # noqa: E402
from globe.hf import FactoredExperts, few_tokens  # noqa: E402
from globe.hf.banks import Banks  # noqa: E402
from globe.hf.experts import FAMILIES, Place  # noqa: E402

SETS = [some for count in (1, 2, 3) for some in itertools.combinations(FAMILIES, count)]
MIXTURE = 4 * RANK * SIZE  # bytes in fp32
BUDGETS = {"none": 0, "two of each": 6 * MIXTURE, "all": None}


def made(factored: set[str], budget: int | None = None, dense: nn.Module | None = None) -> FactoredExperts:
    torch.manual_seed(0)
    dense = Dense() if dense is None else dense
    banks = make_banks(tuple(sorted(factored)), EXPERTS + 1)
    banks.cache.resize(budget)
    places = {family: Place(banks.banks[family], 1) for family in factored}
    experts = FactoredExperts(dense, places, banks, {}, {})
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name.endswith(("_left", "_dense")):
                parameter.copy_(torch.randn_like(parameter) / 4)
    return experts


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, two experts of each, of which some are none, and weights."""
    picked = torch.rand(tokens, EXPERTS + 1).argsort(1)[:, :2]
    return torch.randn(tokens, SIZE).to(dtype), picked, torch.rand(tokens, 2).to(dtype)


def in_python(experts: FactoredExperts, *given: torch.Tensor) -> torch.Tensor:
    """What the products in Python make of tokens."""
    other = copy.copy(experts)
    other.__dict__["_few"] = lambda *_: None
    found: torch.Tensor = other(*given)
    return found


def natively(experts: FactoredExperts, *given: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor | None = experts._few(experts, *given)
    assert found is not None
    assert torch.equal(found, experts(*given))
    return found


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("factored", SETS, ids="-".join)
@torch.no_grad()
def test_as_in_python(factored: tuple[str, ...], budget: str) -> None:
    experts = made(set(factored), BUDGETS[budget])
    for tokens in (0, 1, 3, 8, 40):
        given = routed(tokens)
        torch.testing.assert_close(natively(experts, *given), in_python(experts, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
@torch.no_grad()
def test_activations(activation: nn.Module) -> None:
    dense = Dense()
    dense.act_fn = activation
    experts, given = made({"gate"}, dense=dense), routed(4)
    torch.testing.assert_close(natively(experts, *given), in_python(experts, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits_are_closer_to_fp32(dtype: torch.dtype) -> None:
    experts = made({"gate", "down"}).to(dtype)
    given = routed(8, dtype)
    exact = in_python(copy.deepcopy(experts).float(), given[0].float(), given[1], given[2].float())
    found, before = natively(experts, *given), in_python(experts, *given)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 1.1 * (before - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
def test_threads_and_other_tokens_change_nothing() -> None:
    experts, given = made({"gate", "up", "down"}), routed(8)
    found = natively(experts, *given)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(natively(experts, *given), found)
    finally:
        torch.set_num_threads(threads)
    for t in range(8):
        assert torch.equal(natively(experts, *(part[t : t + 1] for part in given))[0], found[t])


@torch.no_grad()
def test_no_mixture_is_evicted() -> None:
    experts = made({"gate"}, 2 * MIXTURE)
    x, picked, weights = routed(1)
    for expert in range(EXPERTS):
        picked[:] = torch.tensor([expert, EXPERTS])
        natively(experts, x, picked, weights)
    stats = experts.banks.stats()
    assert (stats["evictions"], stats["entries"], stats["bytes"]) == (0, 2, 2 * MIXTURE)
    assert stats["hits"] + stats["misses"] == 2 * EXPERTS  # `natively` asks twice


@torch.no_grad()
def test_changed_matrices_are_seen_and_copies_have_their_own() -> None:
    experts, given = made({"up"}), routed(2)
    before = natively(experts, *given)
    other = copy.deepcopy(experts)
    experts.up_left.mul_(2)
    torch.testing.assert_close(natively(experts, *given), in_python(experts, *given), rtol=1e-5, atol=1e-5)
    assert torch.equal(natively(other, *given), before)
    experts.up_left = nn.Parameter(torch.zeros_like(experts.up_left))
    assert not natively(experts, *given).any()


@torch.no_grad()
def test_families_of_other_sizes_are_refused() -> None:
    experts, (x, picked, weights) = made({"gate"}), routed(2)
    natively(experts, x, picked, weights)
    families = experts._few._families
    assert families is not None
    arrays = (picked.contiguous().numpy(), weights.numpy(), x.numpy(), torch.empty_like(x).numpy())
    given = (families["gate"], families["up"], families["down"])
    with pytest.raises(ValueError, match="experts: expected as many as every family has matrices"):
        _native.layer_forward(*given, None, None, None, "float32", 0, EXPERTS + 1, *arrays, 1)
    with pytest.raises(ValueError, match="mixtures: expected a contiguous array of uintp"):
        _native.layer_forward(*given, np.zeros(EXPERTS), None, None, "float32", 0, EXPERTS, *arrays, 1)


def replaced(module: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(module, name, value)
    return module


@torch.no_grad()
def test_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    given = routed(2)
    plain = made({"gate"})
    monkeypatch.setattr(few_tokens, "_WORTH", 40)
    assert plain._few(plain, *routed(8)) is not None and plain._few(plain, *routed(9)) is None
    with torch.enable_grad():
        assert plain._few(plain, *given) is None
    assert plain._few(plain, given[0].double(), *given[1:]) is None
    plain.banks.bits = 8
    assert plain._few(plain, *given) is None
    biased = Dense()
    biased.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, SIZE))
    odd = replaced(Dense(), act_fn=nn.Tanh())
    turned = Dense()
    turned.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, SIZE, 2 * WIDTH))
    turned.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, SIZE))
    for dense in (biased, odd, turned):
        experts = made({"gate"}, dense=dense)
        assert experts._few(experts, *given) is None
        experts(*given)


@torch.no_grad()
def test_after_a_move_nothing_old_is_held() -> None:
    experts, given = made({"gate", "up"}), routed(2)
    natively(experts, *given)
    assert experts._few._families is not None
    experts.to("meta")
    assert experts._few._families is None


def test_banks_take_what_has_room() -> None:
    experts = made({"gate"}, MIXTURE)
    banks: Banks = experts.banks
    bank, like = banks.banks["gate"], torch.empty(0)
    first = banks.held_mixture(bank, 0, like)
    assert first is not None and torch.equal(first, bank.compose(0, torch.float32))
    assert banks.held_mixture(bank, 1, like) is None
    assert banks.held_mixture(bank, 0, like) is first
