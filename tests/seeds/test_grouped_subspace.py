"""Grouped subspaces against NumPy's SVD of every group's stacked experts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from families import Array, clustered, make_family, make_job, make_pool, make_rows, planted, seed_task, silent
from globe.compute.codes import supports
from globe.errors import GlobeError
from globe.fit.codes import spread
from globe.fit.sums import State
from globe.fit.sweep import measure
from globe.fit.training import train
from globe.seeds import Seeds, grouped_subspace
from globe.seeds.grouped_subspace import leading_subspace
from globe.seeds.grouping import balanced_groups
from globe.seeds.proxies import Rows
from globe.settings import Settings

RANK = 8


def seed_of(directory: Path, weights: Array, size: int, rank: int = RANK, **changed: object) -> tuple[Seeds, Rows]:
    family = make_family(directory, weights)
    rows = make_rows(family, rank, Settings())
    return grouped_subspace(seed_task(family, rows, size, **changed)), rows


def best_kept(weights: Array, rank: int) -> float:
    """Energy in the leading right singular vectors of stacked experts, by SVD."""
    stacked = weights.reshape(-1, weights.shape[2])
    return float((np.linalg.svd(stacked, compute_uv=False)[:rank] ** 2).sum())


def test_shuffled_groups_are_found_and_each_atom_spans_its_group(tmp_path: Path) -> None:
    weights = clustered(1, groups=5, each=4, noise=0.3)
    order = np.random.default_rng(2).permutation(20)
    seeds, _ = seed_of(tmp_path, weights[order], 5, subspace_steps=30)
    assert (supports(seeds.codes) == 1).all()
    labels, kinds = seeds.codes.argmax(1), order // 4
    assert len({(label, kind) for label, kind in zip(labels, kinds, strict=True)}) == 5
    for label in range(5):
        atom = seeds.bank[label].numpy().astype(np.float64)
        right = np.linalg.svd(weights[order][labels == label].reshape(-1, 32), full_matrices=False)[2][:RANK]
        angles = np.linalg.svd(np.linalg.qr(atom.T)[0].T @ right.T, compute_uv=False)
        assert angles.min() > 1 - 1e-4


def test_explained_variance_and_the_error_are_those_of_the_best_subspaces(tmp_path: Path) -> None:
    weights = clustered(3, groups=4, each=3, noise=0.8)
    seeds, rows = seed_of(tmp_path, weights, 4, subspace_steps=12)
    labels = seeds.codes.argmax(1)
    wanted = sum(best_kept(weights[labels == label], RANK) for label in range(4)) / (weights**2).sum()
    assert seeds.explained_variance == pytest.approx(wanted, rel=2e-3)
    assert seeds.explained_variance <= wanted + 1e-6
    assert seeds.proxy_error == pytest.approx(1 - seeds.explained_variance)
    family = make_family(tmp_path / "again", weights)
    error = measure(
        make_pool(family, rows), State(seeds.bank, seeds.codes, 1.0), make_job(Settings()), silent
    ).relative_error
    assert error == pytest.approx(1 - seeds.explained_variance, rel=1e-3)


def test_few_steps_come_close(tmp_path: Path) -> None:
    weights = clustered(4, groups=3, each=4, noise=1.0, p=48, d=64)
    seeds, _ = seed_of(tmp_path, weights, 3, rank=24)
    labels = seeds.codes.argmax(1)
    wanted = sum(best_kept(weights[labels == label], 24) for label in range(3)) / (weights**2).sum()
    assert seeds.explained_variance > 0.99 * wanted


def test_atoms_have_unit_norm_and_left_factors_one_scale(tmp_path: Path) -> None:
    weights = clustered(5, groups=4, each=3, noise=0.5) * np.geomspace(0.01, 100, 12)[:, None, None]
    seeds, _ = seed_of(tmp_path, weights, 4, subspace_steps=12)
    np.testing.assert_allclose(seeds.bank.flatten(1).norm(dim=1), 1, rtol=1e-6)
    labels = seeds.codes.argmax(1)
    for label in range(4):
        pseudo = np.linalg.pinv(seeds.bank[label].numpy().astype(np.float64))
        lefts = (weights[labels == label] @ pseudo).reshape(-1, RANK)
        gram = lefts.T @ lefts
        np.testing.assert_allclose(gram / np.trace(gram) * RANK, np.eye(RANK), atol=2e-3)


def test_the_result_does_not_depend_on_the_block_size_and_repeats(tmp_path: Path) -> None:
    weights = clustered(6, groups=4, each=3, noise=0.5)
    steps: list[float] = []
    whole, _ = seed_of(tmp_path, weights, 4, advance=steps.append)
    assert sum(steps) == pytest.approx(2)
    small, _ = seed_of(tmp_path, weights, 4, block_bytes=1)
    assert torch.equal(whole.bank, small.bank) and np.array_equal(whole.codes, small.codes)


def test_experts_of_zeros_take_no_place(tmp_path: Path) -> None:
    weights = clustered(7, groups=3, each=2, noise=0.2)
    padded = np.concatenate([np.zeros((3, 24, 32)), weights, np.zeros((3, 24, 32))])
    seeds, _ = seed_of(tmp_path, padded, 3)
    labels = seeds.codes.argmax(1)[3:9]
    assert sorted(np.bincount(labels)) == [2, 2, 2] and (labels[::2] == labels[1::2]).all()
    assert seeds.explained_variance > 0.9 and (supports(seeds.codes) == 1).all()
    with pytest.raises(GlobeError, match="6 experts are not zero, fewer than the 7 atoms asked for; use --bank-size 6"):
        seed_of(tmp_path / "more", padded, 7)


@pytest.mark.parametrize("size", [1, 6])
def test_one_group_and_a_group_each(size: int, tmp_path: Path) -> None:
    weights = clustered(8, groups=3, each=2, noise=0.5)
    seeds, _ = seed_of(tmp_path, weights, size, subspace_steps=20)
    parts = [weights] if size == 1 else list(weights)
    wanted = sum(best_kept(part[None] if part.ndim == 2 else part, RANK) for part in parts) / (weights**2).sum()
    assert seeds.explained_variance == pytest.approx(wanted, rel=1e-3)


def test_groups_of_lower_rank_than_the_atoms(tmp_path: Path) -> None:
    weights = clustered(9, groups=2, each=3, noise=0.0, rank=3)
    seeds, _ = seed_of(tmp_path, weights, 2)
    assert torch.isfinite(seeds.bank).all()
    assert seeds.explained_variance == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 20, 32])
def test_leading_subspace(rank: int) -> None:
    random = np.random.default_rng(10)
    vectors = np.linalg.qr(random.standard_normal((32, 32)))[0]
    values = np.geomspace(100, 1, 32)
    gram = torch.from_numpy(((vectors * values) @ vectors.T).astype(np.float32))
    start = torch.randn(len(gram), rank, generator=torch.Generator().manual_seed(0))
    basis, inside = leading_subspace(gram, start, 8)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=2e-6)
    assert float(inside.trace()) == pytest.approx(values[:rank].sum(), rel=1e-2)


def test_groups_against_every_partition() -> None:
    rng = np.random.default_rng(11)
    for experts, count in ((6, 2), (6, 3), (7, 3), (5, 4)):
        points = rng.standard_normal((experts, 4))
        similarity = points @ points.T
        centred = points - points.mean(0)
        sizes = np.bincount(np.arange(experts) * count // experts)

        def within(labels: Array, centred: Array = centred) -> float:
            return float(sum((centred[labels == label].sum(0) ** 2).sum() for label in set(labels)))

        found = balanced_groups(similarity, count)
        assert sorted(np.bincount(found, minlength=count)) == sorted(sizes)
        every = (np.array(labels) for labels in itertools.product(range(count), repeat=experts))
        best = max(within(labels) for labels in every if sorted(np.bincount(labels, minlength=count)) == sorted(sizes))
        assert within(found) >= 0.8 * best


def test_planted_groups_are_found_whatever_their_order() -> None:
    rng = np.random.default_rng(12)
    for count, each in ((40, 9), (180, 8)):
        centres = rng.standard_normal((count, 60))
        order = rng.permutation(count * each)
        points = centres[order // each] + 0.3 * rng.standard_normal((count * each, 60))
        found = balanced_groups(points @ points.T, count)
        assert len(set(zip(found, order // each, strict=True))) <= 1.05 * count


def test_loops_lower_the_error_of_one_hot_codes(tmp_path: Path) -> None:
    weights = planted(13, experts=24, p=24, d=32, rank=RANK, atoms=6, uses=3)
    seeds, rows = seed_of(tmp_path, weights, 6)
    settings = Settings(outer_loops=12, codes="nnls", support=4, patience=100)
    family = make_family(tmp_path / "again", weights)
    training = train(make_pool(family, rows), State(seeds.bank, seeds.codes, 1.0), make_job(settings), silent)
    assert training.initial.relative_error == pytest.approx(seeds.proxy_error, rel=1e-3)
    assert training.measure.relative_error < 0.95 * training.initial.relative_error
    assert [record.loop for record in training.history] == list(range(1, 13))
    short = Settings(outer_loops=1, codes="nnls", support=4)
    kept = train(make_pool(family, rows), State(seeds.bank, seeds.codes, 1.0), make_job(short), silent)
    assert kept.measure.relative_error <= kept.initial.relative_error


def test_spread_codes() -> None:
    codes = 3.0 * np.eye(10)[np.arange(40) % 10]
    mixed = spread(codes, 4, 1.0, seed=0)
    assert (supports(mixed) == 5).all() and (mixed[codes > 0] == 3).all() and mixed.max() == 3
    assert np.array_equal(mixed, spread(codes, 4, 1.0, seed=0))
    assert not np.array_equal(mixed, spread(codes, 4, 1.0, seed=1))
    np.testing.assert_allclose(spread(codes, 4, 0.5, seed=0)[codes == 0], mixed[codes == 0] / 2)
    assert (supports(spread(np.eye(3), 50, 1.0, seed=0)) == 3).all()
