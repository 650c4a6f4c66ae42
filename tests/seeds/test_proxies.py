"""Which rows are held out, which make a proxy, and what the first pass sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import CPU, make_family, planted, silent, write_checkpoint
from globe.checkpoint.index import Checkpoint
from globe.seeds.proxies import proxy_blocks, row_spans, scan, split_rows
from globe.settings import Settings

SELECTORS = ["energy", "uniform", "random"]


@pytest.mark.parametrize("selector", SELECTORS)
@given(data=st.data())
def test_rows_are_split_and_selected_without_repeats(selector: str, data: st.DataObject) -> None:
    p = data.draw(st.integers(1, 400))
    rank = data.draw(st.integers(1, p))
    share = data.draw(st.sampled_from([0.0, 1 / 32, 0.2, 0.5]))
    energy = np.random.default_rng(p).random(p)
    rows = split_rows(p, rank, energy, Settings(selector=selector, validation_share=share))
    assert sorted([*rows.train, *rows.validation]) == list(range(p))
    assert len(rows.proxy) == rank == len(set(rows.proxy))
    assert (np.diff(rows.proxy) > 0).all()
    assert set(rows.proxy) <= set(rows.train)
    wanted = max(1, round(p * share)) if share else 0
    assert len(rows.validation) == min(wanted, p - rank)


def test_one_row_in_32_is_held_out_evenly() -> None:
    rows = split_rows(384, 288, np.ones(384), Settings())
    np.testing.assert_array_equal(rows.validation, np.arange(16, 384, 32))


def test_energy_takes_the_strongest_training_rows() -> None:
    energy = np.random.default_rng(1).permutation(96).astype(float)
    rows = split_rows(96, 20, energy, Settings())
    by_hand = sorted(rows.train, key=lambda row: -energy[row])[:20]
    np.testing.assert_array_equal(rows.proxy, sorted(by_hand))


def test_uniform_keeps_an_even_stride() -> None:
    rows = split_rows(96, 20, np.ones(96), Settings(selector="uniform"))
    gaps = np.diff(np.searchsorted(rows.train, rows.proxy))
    assert gaps.min() >= len(rows.train) // 20 and gaps.max() <= len(rows.train) // 20 + 1


def test_random_depends_on_the_seed_alone() -> None:
    chosen = {
        seed: [
            split_rows(96, 20, energy, Settings(selector="random", seed=seed)).proxy.tolist()
            for energy in (np.ones(96), np.arange(96.0))
        ]
        for seed in (0, 1)
    }
    assert chosen[0][0] == chosen[0][1] != chosen[1][0] == chosen[1][1]


@pytest.mark.parametrize(("most", "step"), [(256, 1), (10, 1), (9, 2), (4, 3), (3, 4), (1, 10)])
def test_rows_are_ranked_on_at_most_so_many_even_experts(most: int, step: int, tmp_path: Path) -> None:
    weights = planted(0, experts=10, p=6, d=5, rank=2, atoms=3)
    found = scan(make_family(tmp_path, weights), Settings(energy_experts=most), silent)
    assert len(weights[::step]) <= most
    np.testing.assert_allclose(found.row_energy, (weights[::step] ** 2).sum((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.energy, (weights**2).sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("budget", [1, 8 * 7 * 9 * 2, 1 << 20])
def test_proxies_are_the_chosen_rows_whatever_the_block(budget: int, tmp_path: Path) -> None:
    weights = np.random.default_rng(2).standard_normal((7, 12, 9))
    family = Checkpoint(write_checkpoint(tmp_path, torch.bfloat16, layers=1, gate=weights)).family("gate")
    chosen = np.array([1, 2, 5, 6, 11])
    stacked = np.zeros((7, 5, 9), np.float32)
    for span, block in proxy_blocks(family, chosen, CPU, row_spans(len(family), len(chosen), family.d, budget)):
        assert block.dtype == torch.bfloat16
        assert 4 * block.nbytes <= max(budget, 8 * 7 * 9)  # this one, the one being read, and a copy in fp32
        stacked[:, span] = block.view(7, -1, 9).float().numpy()
    np.testing.assert_array_equal(stacked, torch.from_numpy(weights).bfloat16().float().numpy()[:, chosen])
