"""Rank and bank size for a ratio: what is offered, what is probed, what is chosen and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import WEIGHTS_ONLY, Array, planted, silent, write_checkpoint
from globe import Settings, compress, export
from globe.checkpoint.family import Expert, Family
from globe.checkpoint.formats.packed import Packing
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import TensorInfo
from globe.choice.inspect import inspect
from globe.choice.probe import SAMPLE, WeightProber, samples
from globe.choice.ratio_plan import Probing, candidates, plan_ratio, probes, sizes_of
from globe.compute.blocks import BLOCKS
from globe.errors import UsageError
from globe.pipeline.compare import compare
from globe.seeds.proxies import scan
from globe.sizes.pools import Size, pools, units
from globe.sizes.ratios import Shape, Storage, stored_bytes, stored_elements
from refusals import refusal

LAYERS, EACH, P, D = 12, 8, 24, 40


def family(name: str = "gate", layers: int = LAYERS, each: int = EACH, p: int = P, d: int = D) -> Family:
    info = TensorInfo(Path("none"), "BF16", (p, d), 0, 2 * p * d)
    places = [(layer, expert) for layer in range(layers) for expert in range(each)]
    return Family(name, tuple(Expert(*place, "w", info, None, 0, name) for place in places), p, d)


@dataclass
class Fake:
    """Errors by formula, and the sizes that were asked for."""

    error: Callable[[str, float, float], float]
    svd: float = 1.0
    asked: list[tuple[str, Size, int]] = field(default_factory=list)

    def fit(self, sample: Family, size: Size) -> Array:
        self.asked.append((sample.name, size, len(sample)))
        return np.full(len(sample), self.error(sample.name, size.rank / P, size.bank / len(sample)))

    def truncated(self, sample: Family, rank: int) -> Array:
        return np.full(len(sample), self.svd)


def valley(share: float) -> Callable[[str, float, float], float]:
    return lambda name, rank, atoms: 0.1 + abs(np.log(atoms / share))


def asked_for(ratio: float, **changed: Any) -> Settings:
    return Settings(ratio=ratio, **changed)


@given(
    ratio=st.floats(0.05, 0.99),
    layers=st.integers(1, 12),
    each=st.integers(1, 20),
    scope=st.sampled_from(["global", "layer", 3]),
)
def test_candidates_are_as_large_as_the_ratio_lets_them(ratio: float, layers: int, each: int, scope: str | int) -> None:
    unit = family(layers=layers, each=each)
    dense = len(unit) * P * D
    try:
        offered = candidates(unit, ratio, scope)
    except UsageError as error:
        assert "not worth compressing" in str(error)
        return
    for size in offered:
        held, shapes = pools({"gate": unit}, {"gate": size}, Settings(scope=scope, codes="nnls"))  # type: ignore[arg-type]
        stored = sum(stored_elements(held[name], replace(shapes[name], nonzeros=0)) for name in held)
        assert stored <= ratio * dense
        more = len(unit) * P + size.bank * D
        assert size.rank == P or stored + more + 4 * len(unit) * size.bank + 2 * (len(unit) + 1) > ratio * dense
    assert [size.bank for size in offered] == sorted({size.bank for size in offered})


@given(ratio=st.floats(0.05, 0.6), each=st.integers(4, 20), bits=st.sampled_from([8, 4, 3]), atoms=st.booleans())
def test_candidates_of_packed_factors(ratio: float, each: int, bits: int, atoms: bool) -> None:
    """Ranks are those that groups divide, as large as the bytes let them, and larger than those of bf16."""
    unit, packing = family(each=each), Packing(bits, 4)
    how = Storage(packing, packing if atoms else None)
    try:
        offered = {size.bank: size.rank for size in candidates(unit, ratio, how=how)}
    except UsageError as error:
        assert "not worth compressing" in str(error) and f"rank {packing.group} " in str(error)
        return
    allowed = 2 * ratio * len(unit) * P * D
    for bank, rank in offered.items():
        assert rank % packing.group == 0
        stored, more = (
            stored_bytes(unit, Shape(rank + extra, bank, len(unit) * bank, how)) for extra in (0, packing.group)
        )
        assert stored <= allowed + 1e-6
        assert rank + packing.group > min(P, D) or more > allowed - 1e-6


@pytest.mark.parametrize("share", [1 / 24, 1 / 12, 1 / 6, 1 / 4, 1 / 2])
def test_the_valley_is_found(share: float) -> None:
    unit, fake, steps, lines = family(), Fake(valley(share)), [], []
    probing = Probing(fake, asked_for(0.7), advance=steps.append, log=lines.append)
    plan = plan_ratio({"gate": unit}, {"gate": np.ones(len(unit))}, probing)
    chosen = plan.units["gate"]
    assert chosen.size.bank == round(share * len(unit))
    assert chosen.ratio <= 0.7 and chosen.worth_it and plan.sizes == {"gate": chosen.size}
    assert all(count == SAMPLE for _, _, count in fake.asked)
    assert sum(steps) <= probes(1)
    assert {point.bank for point in chosen.frontier} == {
        round(size.bank / SAMPLE * len(unit)) for _, size, _ in fake.asked
    }
    assert sizes_of(json.loads(json.dumps(plan.as_dict()))) == plan.sizes
    assert f"gate: rank {chosen.size.rank} and {chosen.size.bank} atoms chosen, ratio {chosen.ratio:.3f}" in lines
    assert sum(line.endswith("best") for line in lines) == 1


def test_of_banks_that_are_as_good_the_smallest_is_taken() -> None:
    unit, fake = family(), Fake(lambda name, rank, atoms: 0.1749 - 0.002 * (atoms - 0.25) + 10 * max(0.0, 0.25 - atoms))
    chosen = plan_ratio({"gate": unit}, {"gate": np.ones(len(unit))}, Probing(fake, asked_for(0.7))).units["gate"]
    assert chosen.size.bank == chosen.best.bank == len(unit) // 4
    assert [point.bank for point in chosen.frontier] == [16, 24, 32, 48]


def test_a_family_that_truncation_serves_better_is_named() -> None:
    unit, lines = family(), []
    plan = plan_ratio(
        {"up": unit}, {"up": np.ones(len(unit))}, Probing(Fake(valley(0.25), 0.05), asked_for(0.7), log=lines.append)
    )
    assert not plan.units["up"].worth_it
    assert lines[-1].startswith("up: not worth a bank: truncated SVD of rank 10 loses 0.0500 at the same bytes")


def test_bytes_go_to_the_family_that_needs_them() -> None:
    whole = {name: family(name) for name in ("gate", "up")}

    def error(name: str, rank: float, atoms: float) -> float:
        steep = 8.0 if name == "gate" else 0.5
        return float(np.exp(-steep * rank) + abs(atoms - 0.25))

    energies = {name: np.ones(len(unit)) for name, unit in whole.items()}
    plan = plan_ratio(whole, energies, Probing(Fake(error), asked_for(0.6)))
    assert plan.units["gate"].size.bank == plan.units["up"].size.bank
    assert plan.units["gate"].ratio < 0.6 < plan.units["up"].ratio  # gate has next to nothing left to lose
    assert sum(unit.ratio for unit in plan.units.values()) <= 2 * 0.6
    energies["gate"] *= 1e3
    heavier = plan_ratio(whole, energies, Probing(Fake(error), asked_for(0.6)))
    assert heavier.units["up"].ratio < 0.6 < heavier.units["gate"].ratio


def test_what_does_not_fit_is_not_chosen() -> None:
    unit = family()
    energies, fake = {"gate": np.ones(len(unit))}, Fake(valley(0.5))
    small = Probing(fake, asked_for(0.7), fits=lambda name, size: size.bank <= 20)
    assert plan_ratio({"gate": unit}, energies, small).sizes["gate"].bank == 16
    with pytest.raises(UsageError, match=r"^ratio is 0.7: no bank of family gate .* fits --max-memory"):
        plan_ratio({"gate": unit}, energies, Probing(fake, asked_for(0.7), fits=lambda name, size: False))


@pytest.mark.parametrize("scope", ["global", "layer", 4])
@pytest.mark.parametrize("share", [False, True])
def test_samples(scope: str | int, share: bool) -> None:
    chosen = {name: family(name) for name in ("gate", "down")}
    (unit, *_) = units(chosen, Settings(share_families=share)).values()
    energy = np.arange(len(unit), dtype=float)
    energy[: len(unit) // 2 : 2] = 0
    found = samples(unit, energy, scope)
    assert SAMPLE - 6 <= sum(len(sample) for sample, _ in found) <= SAMPLE
    for sample, energies in found:
        numbers = [unit.experts.index(expert) for expert in sample.experts]
        assert len(set(numbers)) == len(numbers)
        assert (energies == energy[numbers]).all() and (energies > 0).all()
        assert set(sample.families) == set(unit.families)
    layers = {expert.layer for sample, _ in found for expert in sample.experts}
    assert len(layers) >= (2 if scope == 4 else 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = {
        name: planted(k, experts=16, p=16, d=24, rank=8, atoms=4, noise=0.1) for k, name in enumerate(("gate", "up"))
    }
    down = planted(5, experts=16, p=16, d=24, rank=6, atoms=6, noise=0.3).transpose(0, 2, 1)
    return write_checkpoint(tmp_path_factory.mktemp("planned") / "source", torch.bfloat16, layers=4, **made, down=down)


def test_truncation_is_that_of_the_singular_values(source: Path, tmp_path: Path) -> None:
    for name in ("gate", "down"):
        unit = Checkpoint(source).family(name)
        prober = WeightProber(Settings(), torch.device("cpu"), BLOCKS, tmp_path)
        values = [torch.linalg.svdvals(unit.read(k).double()).square() for k in range(len(unit))]
        wanted = [float(squares[5:].sum() / squares.sum()) for squares in values]
        np.testing.assert_allclose(prober.truncated(unit, 5), wanted, rtol=1e-6)


def test_a_planted_bank_is_worth_it(source: Path, tmp_path: Path) -> None:
    unit = Checkpoint(source).family("gate")
    prober = WeightProber(Settings(), torch.device("cpu"), BLOCKS, tmp_path)
    energy = scan(unit, Settings(), silent).energy
    plan = plan_ratio({"gate": unit}, {"gate": energy}, Probing(prober, asked_for(0.5))).units["gate"]
    assert plan.worth_it and plan.bank_error < 0.5 * plan.truncated_error
    again = plan_ratio({"gate": unit}, {"gate": energy}, Probing(prober, asked_for(0.5))).units["gate"]
    assert again == plan


@pytest.mark.parametrize(
    "options",
    [{"families": ("gate", "down")}, {"scope": "layer"}, {"share_families": True, "families": ("gate", "up", "down")}],
    ids=["two", "layer", "shared"],
)  # fmt: skip
def test_compress_to_a_ratio(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    settings = Settings(ratio=0.6, outer_loops=1, device="cpu", **WEIGHTS_ONLY, **options)
    result = compress(source, tmp_path / "out", settings, keep_run=True)
    plan = result.metrics["plan"]
    assert 0.45 < result.ratio.touched <= 0.6
    assert list(plan["units"]) == (["gate+up+down"] if "share_families" in options else list(settings.families))
    for name, unit in plan["units"].items():
        for family_name in name.split("+"):
            found = result.metrics["families"][family_name]
            assert (found["rank"], found["bank"]) == (unit["size"]["rank"], unit["size"]["bank"])
    export(tmp_path / "out", tmp_path / "dense")
    weights = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "out" / "config.json").unlink()  # as if stopped at the very end
    again = compress(source, tmp_path / "out", settings)
    assert again.metrics["plan"] == plan
    assert next(stage for stage in again.metrics["stages"] if stage["name"] == "plan")["resumed"]
    assert weights == {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}


def test_inspect_shows_what_stores_the_ratio(source: Path) -> None:
    found = inspect(source, Settings(ratio=0.6, families=("gate", "up", "down")))
    assert found["chosen"] == ["gate", "up", "down"]
    assert found["choices"] and all(0.5 < choice["ratio"]["touched"] <= 0.6 for choice in found["choices"])


def test_methods_are_not_compared_at_a_ratio(source: Path) -> None:
    with pytest.raises(UsageError, match="one rank and bank size, not at a ratio"):
        compare(source, settings=Settings(ratio=0.6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ratio", "0.7", "--rank", "0.75"), ("ratio and rank are both given",)),
        (("--ratio", "0.7", "--bank-size", "3"), ("ratio and bank_size are both given",)),
        (("--ratio", "0.7", "--bank-ratio", "0.1"), ("ratio and bank_ratio are both given",)),
        (("--ratio", "1"), ("ratio is 1.0", "between 0 and 1")),
        (("--ratio", "0"), ("ratio is 0.0", "between 0 and 1")),
        (("--ratio", "0.01"), ("ratio is 0.01", "family gate", "not worth compressing", "--families")),
    ],
)
def test_refusals(options: tuple[str, ...], words: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    line = refusal(2, "compress", source, tmp_path / "out", *options)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()
