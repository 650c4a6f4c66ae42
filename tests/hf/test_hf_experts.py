"""Factored experts against dense matrices multiplied out, for every set of families, without any file."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from globe.errors import GlobeError  # noqa: E402
from globe.hf import FactoredExperts  # noqa: E402
from globe.hf.banks import Banks  # noqa: E402
from globe.hf.experts import FAMILIES, Place  # noqa: E402

EXPERTS, WIDTH, SIZE, RANK, ATOMS = 5, 12, 16, 6, 4


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, SIZE) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, SIZE, WIDTH) / 4)
        self.act_fn = nn.SiLU()


def make_banks(names: tuple[str, ...], rows: int) -> Banks:
    """Banks whose codes have two atoms in every row."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes[f"globe.{name}.atoms"] = (ATOMS, RANK, SIZE)
        shapes[f"globe.{name}.codes.indptr"] = (rows + 1,)
        shapes[f"globe.{name}.codes.indices"] = (2 * rows,)
    banks = Banks(names, shapes)
    for bank in banks.banks.values():
        bank.atoms.copy_(torch.randn(ATOMS, RANK, SIZE))
        bank.codes.indptr.copy_(torch.arange(rows + 1) * 2)
        bank.codes.indices.copy_(torch.stack([torch.randperm(ATOMS)[:2].sort().values for _ in range(rows)]).flatten())
        bank.codes.values.copy_(torch.rand(2 * rows))
    return banks


def codes(bank: Any, row: int) -> torch.Tensor:
    dense = torch.zeros(ATOMS)
    dense[bank.codes.indices[2 * row : 2 * row + 2].long()] = bank.codes.values[2 * row : 2 * row + 2]
    return dense


def multiplied_out(experts: FactoredExperts, dense: Dense) -> dict[str, torch.Tensor]:
    """The experts' matrices, (E, p, d) for gate and up and (E, d, p) for down."""
    gate, up = dense.gate_up_proj.chunk(2, 1)
    found = {"gate": gate, "up": up, "down": dense.down_proj}
    for family, place in experts.places.items():
        left = getattr(experts, f"{family}_left")
        rows = [codes(place.bank, place.row(e)) for e in range(EXPERTS)]
        product = left @ torch.stack([torch.tensordot(row, place.bank.atoms.float(), 1) for row in rows])
        found[family] = product.mT if family == "down" else product
    return found


def build(families: tuple[str, ...], *, shared: bool = False) -> tuple[FactoredExperts, Dense]:
    """Experts of the second layer of two, with banks of their own or one in which the families take turns."""
    dense = Dense()
    banks = make_banks(("all",) if shared else families, 2 * EXPERTS * (len(families) if shared else 1))
    places = {
        family: Place(banks.banks["all"], EXPERTS * len(families) + number, len(families))
        if shared
        else Place(banks.banks[family], EXPERTS)
        for number, family in enumerate(families)
    }
    experts = FactoredExperts(dense, places, banks)
    with torch.no_grad():
        for family in families:
            getattr(experts, f"{family}_left").normal_(std=0.25)
        for family, half in zip(("gate", "up"), dense.gate_up_proj.chunk(2, 1), strict=True):
            if hasattr(experts, f"{family}_dense"):
                getattr(experts, f"{family}_dense").copy_(half)
    return experts, dense


def expected(matrices: dict[str, torch.Tensor], x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    total = torch.zeros_like(x)
    for token, place in itertools.product(range(len(x)), range(index.shape[1])):
        e = int(index[token, place])
        if e < EXPERTS:
            hidden = torch.nn.functional.silu(matrices["gate"][e] @ x[token]) * (matrices["up"][e] @ x[token])
            total[token] += weights[token, place] * (matrices["down"][e] @ hidden)
    return total


SETS = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(FAMILIES, count)]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("families", SETS, ids="+".join)
def test_every_set_of_families(families: tuple[str, ...], shared: bool) -> None:
    torch.manual_seed(len(families))
    experts, dense = build(families, shared=shared)
    x = torch.randn(9, SIZE)
    index = torch.randint(0, EXPERTS + 1, (9, 2))  # EXPERTS is none of them
    weights = torch.rand(9, 2)
    with torch.no_grad():
        found = experts(x, index, weights)
        torch.testing.assert_close(found, expected(multiplied_out(experts, dense), x, index, weights))


def test_one_token_and_none_for_an_expert() -> None:
    experts, dense = build(("gate", "up"))
    matrices = multiplied_out(experts, dense)
    x, weights = torch.randn(1, SIZE), torch.ones(1, 1)
    with torch.no_grad():
        for expert in range(EXPERTS):
            index = torch.tensor([[expert]])
            torch.testing.assert_close(experts(x, index, weights), expected(matrices, x, index, weights))
        assert not experts(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mixtures_are_composed_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    experts, _ = build(("gate",))
    place = experts.places["gate"]
    found = experts.mixture("gate", 2, torch.zeros(1, dtype=dtype))
    exact = torch.tensordot(codes(place.bank, place.row(2)).double(), place.bank.atoms.double(), 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.float().to(dtype), rtol=2e-6 if dtype == torch.float64 else None, atol=None
                               if dtype != torch.float64 else 1e-6)  # fmt: skip


def test_stored_values_survive_another_dtype() -> None:
    experts, _ = build(("gate",))
    banks = experts._banks[0]
    bank = banks.banks["gate"]
    atoms, values = bank.atoms.clone(), bank.codes.values.clone()
    experts.mixture("gate", 0, torch.zeros(1))
    banks.to(torch.float16)
    assert bank.atoms.dtype == torch.bfloat16 and bank.codes.values.dtype == torch.float32
    assert torch.equal(bank.atoms, atoms) and torch.equal(bank.codes.values, values)
    assert banks.stats()["entries"] == 0


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("codes.indices", lambda bank: bank.codes.indices.fill_(ATOMS)),
        ("codes.indices", lambda bank: bank.codes.indices.fill_(-1)),
        ("codes.indptr", lambda bank: bank.codes.indptr[1].fill_(99)),
        ("codes.values", lambda bank: bank.codes.values[0].fill_(float("nan"))),
        ("atoms", lambda bank: bank.atoms[1, 2, 3].fill_(float("inf"))),
    ],
)
def test_damaged_banks(part: str, damage: Any) -> None:
    bank = make_banks(("gate",), 4).banks["gate"]
    damage(bank)
    with pytest.raises(GlobeError, match=f"globe.gate.{part} is damaged"):
        bank.prepare()


def test_experts_of_another_make() -> None:
    biased = Dense()
    biased.gate_up_proj_bias = nn.Parameter(torch.zeros(1))
    more, wide = Dense(), Dense()
    more.scale = nn.Parameter(torch.ones(EXPERTS))
    wide.down_proj = nn.Parameter(torch.zeros(EXPERTS, SIZE, WIDTH + 1))
    for odd in (biased, more, wide, nn.Linear(2, 2)):
        with pytest.raises(GlobeError, match="not made of gate_up_proj"):
            FactoredExperts(odd, {}, SimpleNamespace())  # type: ignore[arg-type]
