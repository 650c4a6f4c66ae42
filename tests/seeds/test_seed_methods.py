"""What every seeding method promises, whatever it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import WEIGHTS_ONLY, make_family, make_rows, planted, seed_task, write_checkpoint
from globe import Settings, compress
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.errors import GlobeError
from globe.seeds import METHODS, Seeds, sources
from globe.seeds.proxies import Rows

RANK, SIZE = 6, 7
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("kmeans", {"proxies": "projected"}),
    ("farthest-first", {"proxies": "projected"}),
    ("residual-greedy", {"proxies": "projected", "greedy_codes": "lasso"}),
    ("hybrid-split", {"proxies": "projected", "hybrid_centres": "farthest-first"}),
    ("hybrid-replace", {"proxies": "projected", "hybrid_share": 1.0}),
    ("rpca", {"oversampling": 0, "power_iterations": 0}),
    ("aligned-pca", {"procrustes_rounds": 3, "energy_experts": 5}),
]
every_variant = pytest.mark.parametrize(
    ("method", "changed"), VARIANTS, ids=[" ".join([name, *map(str, changed.values())]) for name, changed in VARIANTS]
)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    weights = (
        planted(0, experts=22, p=20, d=18, rank=RANK, atoms=12, noise=0.3) * np.geomspace(0.1, 10, 22)[:, None, None]
    )
    return make_family(tmp_path_factory.mktemp("family"), weights)


@pytest.fixture(scope="module")
def rows(family: Family) -> Rows:
    return make_rows(family, RANK, Settings())


def test_the_registry_is_the_list_of_the_settings() -> None:
    assert (*METHODS, "auto") == Settings.choices("method")


@every_variant
def test_seeds_are_a_bank_and_codes(method: str, changed: dict, family: Family, rows: Rows, tmp_path: Path) -> None:
    steps: list[float] = []
    task = seed_task(family, rows, SIZE, scratch=tmp_path, advance=steps.append, **changed)
    seeds = METHODS[method](task)
    assert seeds.bank.shape == (SIZE, RANK, family.d) and seeds.bank.dtype == torch.float32
    assert seeds.bank.is_contiguous()
    np.testing.assert_allclose(seeds.bank.flatten(1).norm(dim=1), 1, rtol=1e-6)
    assert seeds.codes.shape == (len(family), SIZE)
    assert seeds.codes.min() >= 0 and (seeds.codes.max(1) > 0).all()
    assert 0 < seeds.explained_variance <= 1
    assert 1 - seeds.explained_variance - 1e-6 <= seeds.proxy_error < 1
    assert sum(steps) == pytest.approx(METHODS[method].passes(task.settings))


@every_variant
def test_same_seeds_again_and_in_blocks_of_one_row(
    method: str, changed: dict, family: Family, rows: Rows, tmp_path: Path
) -> None:
    def seed(**given: int) -> Seeds:
        return METHODS[method](seed_task(family, rows, SIZE, scratch=tmp_path, **given, **changed))

    first, again, streamed = seed(), seed(), seed(block_bytes=1)
    assert torch.equal(first.bank, again.bank) and np.array_equal(first.codes, again.codes)
    np.testing.assert_allclose(streamed.bank, first.bank, atol=3e-5)
    np.testing.assert_allclose(streamed.codes, first.codes, atol=3e-4)


@every_variant
def test_experts_of_zeros_change_nothing(method: str, changed: dict, tmp_path: Path) -> None:
    weights = planted(4, experts=12, p=20, d=16, rank=4, atoms=6)
    found = []
    for name, experts in (("plain", weights), ("padded", np.concatenate([weights, np.zeros((4, 20, 16))]))):
        settings = {"selector": "uniform", **changed, "energy_experts": 256, "oversampling": 8, "power_iterations": 1}
        family = make_family(tmp_path / name, experts)
        rows = make_rows(family, 4, Settings(**settings))
        found.append(METHODS[method](seed_task(family, rows, 4, scratch=tmp_path / name, **settings)))
    plain, padded = found
    assert padded.explained_variance == pytest.approx(plain.explained_variance, rel=1e-4)
    assert padded.proxy_error == pytest.approx(plain.proxy_error, rel=1e-3)
    np.testing.assert_allclose(padded.bank, plain.bank, atol=2e-4)
    assert np.isfinite(padded.codes).all() and (padded.codes.max(1) > 0).all()


@pytest.mark.parametrize(("method", "changed"), [pair for pair in VARIANTS if pair[0] != "grouped-subspace"])
def test_rows_held_out_are_not_seen(method: str, changed: dict, family: Family, rows: Rows, tmp_path: Path) -> None:
    weights = torch.stack([family.read(number) for number in range(len(family))]).double().numpy()
    weights[:, rows.validation] *= 100
    found = [
        METHODS[method](seed_task(which, rows, SIZE, scratch=tmp_path, **changed))
        for which in (family, make_family(tmp_path / "changed", weights))
    ]
    assert len(rows.validation) and torch.equal(found[0].bank, found[1].bank)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "grouped-subspace"])
def test_more_atoms_than_directions_are_refused(method: str, tmp_path: Path) -> None:
    one = planted(5, experts=1, p=20, d=16, rank=4, atoms=1)
    family = make_family(tmp_path, one * np.arange(1.0, 7)[:, None, None])
    rows = make_rows(family, 4, Settings())
    seeds = METHODS[method](seed_task(family, rows, 1, scratch=tmp_path))
    assert seeds.explained_variance == pytest.approx(1, abs=1e-5)
    with pytest.raises(GlobeError, match=r"1 direction, fewer than the 4 atoms asked for; use --bank-size 1 or less"):
        METHODS[method](seed_task(family, rows, 4, scratch=tmp_path))


@every_method
def test_bf16_and_fp16_experts_give_nearly_the_same_seeds(
    method: str, family: Family, rows: Rows, tmp_path: Path
) -> None:
    weights = torch.stack([family.read(i) for i in range(len(family))]).bfloat16().double().numpy()
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        directory = write_checkpoint(tmp_path / str(dtype), dtype, gate=weights)
        task = seed_task(Checkpoint(directory).family("gate"), rows, SIZE, scratch=directory)
        found.append(METHODS[method](task))
    for other in found[1:]:
        assert other.explained_variance == pytest.approx(found[0].explained_variance, rel=1e-3)
        assert other.proxy_error == pytest.approx(found[0].proxy_error, rel=1e-2)


@every_method
def test_a_run_with_every_method(method: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"rank": 0.5, "bank_size": 4, "outer_loops": 1, "device": "cpu", **WEIGHTS_ONLY}
    settings = Settings(**small, method=method)  # type: ignore[arg-type]
    weights = planted(6, experts=12, p=24, d=32, rank=12, atoms=6, noise=0.3)
    source = write_checkpoint(tmp_path / "source", torch.bfloat16, gate=weights, up=2 * weights[::-1], down=weights)
    found = compress(source, tmp_path / "out", settings).metrics["families"]
    assert set(found) == {"gate", "up"}
    for family in found.values():
        assert family["relative_error"] < 1.005 * family["init"]["relative_error"] < 1
    assert not list((tmp_path / "out").glob("**/proxies-*"))


def test_no_room_for_the_scratch_file(
    family: Family, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(GlobeError, match=r"GB free, the proxies need .* GB of scratch; free some space or use"):
        METHODS["left-gram"](seed_task(family, rows, SIZE, scratch=tmp_path))
    assert not list(tmp_path.iterdir())
    METHODS["ts-pca"](seed_task(family, rows, SIZE, scratch=tmp_path))
