"""From a dense checkpoint to a factored one and back, for every layout, against a plain NumPy reader."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import LAYOUTS, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY_OPTIONS  # noqa: E402
from globe import evaluate  # noqa: E402
from globe.checkpoint.layouts import FAMILIES, read_layouts  # noqa: E402
from trips import (  # noqa: E402
    ALL,
    SMALL_OPTIONS,
    TEXT,
    Trip,
    check_round_trip,
    dense_experts,
    load_plain,
    read_directory,
    relative_errors,
    travel,
)

REGISTERED = sorted(set(LAYOUTS) - {"llama4_text"})
FUSED = ("qwen3_5_moe", "granitemoe")


def test_every_registered_layout_has_a_tiny_checkpoint() -> None:
    types = {name for layout in read_layouts() for name in layout.model_types}
    assert len(REGISTERED) == 12
    assert {name.removesuffix("_text") for name in types} >= set(REGISTERED)


@pytest.mark.parametrize("layout", REGISTERED)
def test_round_trip(layout: str, trips: Callable[..., Trip]) -> None:
    trip = trips(layout, *ALL)
    check_round_trip(trip)
    assert list(trip.metrics["families"]) == ["gate", "up", "down"]
    assert trip.metrics["ratio"]["touched"] == trip.metrics["ratio"]["experts"]
    for family, error in relative_errors(trip).items():
        assert trip.metrics["families"][family]["relative_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("layout", REGISTERED)
def test_export_speaks_like_the_factored_checkpoint(layout: str, trips: Callable[..., Trip]) -> None:
    trip = trips(layout, *ALL)
    load_plain(trip.dense)
    found = evaluate(trip.out, against=trip.dense, text=TEXT, window=64)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=5e-3)  # the export's are rounded to bf16
    assert found.kl == pytest.approx(0, abs=1e-4)
    moved = evaluate(trip.dense, against=trip.source, text=TEXT, window=64)
    assert moved.kl is not None and moved.kl > 0


@pytest.mark.parametrize(("dtype", "shards"), [("float16", 1), ("float16", 3), ("float32", 1), ("float32", 3)])
@pytest.mark.parametrize("layout", ["olmoe", "qwen3_5_moe"])
def test_other_dtypes_and_shard_counts(layout: str, dtype: str, shards: int, trips: Callable[..., Trip]) -> None:
    trip = trips(layout, dtype=dtype, shards=shards)
    check_round_trip(trip)
    assert len(list(trip.out.glob("globe*.safetensors"))) == shards + 1  # the bank has a file of its own
    assert len(list(trip.dense.glob("*.safetensors"))) == shards
    load_plain(trip.dense)


@pytest.mark.parametrize("family", ["gate", "up", "down"])
@pytest.mark.parametrize("layout", ["mixtral", *FUSED])
def test_one_family_alone(layout: str, family: str, trips: Callable[..., Trip]) -> None:
    trip = trips(layout, "--families", family)
    check_round_trip(trip)
    assert set(trip.metrics["families"]) == {family}
    if layout in FUSED and family != "down":  # the other half of every fused tensor comes back bit for bit
        before, after = read_directory(trip.source), read_directory(trip.dense)
        for name in dense_experts(trip.out):
            half = before[name].shape[1] // 2
            kept = slice(half, None) if family == "gate" else slice(0, half)
            bits = [
                np.frombuffer(tensors[name].raw, np.uint16).reshape(tensors[name].shape) for tensors in (before, after)
            ]
            np.testing.assert_array_equal(bits[0][:, kept], bits[1][:, kept])
    load_plain(trip.dense)


def test_families_have_banks_of_their_own(trips: Callable[..., Trip]) -> None:
    stored = read_directory(trips("olmoe").out)
    gate, up = stored["globe.gate.atoms"], stored["globe.up.atoms"]
    assert gate.shape == up.shape == (3, 16, 64)
    assert gate.dtype == "BF16"
    assert gate.raw != up.raw
    assert [stored[f"globe.gate.codes.{part}"].dtype for part in ("indptr", "indices", "values")] == [
        "I32",
        "I32",
        "F32",
    ]


SCOPES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "layer": (("--scope", "layer"), [f"{family}.layer-{layer}" for family in FAMILIES for layer in (0, 1)]),
    "shared": (("--share-families",), ["gate+up+down"]),
    "both": (("--scope", "1", "--share-families"), ["gate+up+down.layer-0", "gate+up+down.layer-1"]),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layout", ["olmoe", "granitemoe"])
def test_who_shares_a_bank(layout: str, scope: str, trips: Callable[..., Trip]) -> None:
    options, names = SCOPES[scope]
    trip, plain = trips(layout, *ALL, *options), trips(layout, *ALL)
    check_round_trip(trip)
    assert list(trip.metrics["pools"]) == names and "pools" not in plain.metrics
    assert list(trip.metrics["families"]) == list(FAMILIES)
    for family, error in relative_errors(trip).items():
        found = trip.metrics["families"][family]
        assert found["relative_error"] == pytest.approx(error, rel=1e-4)
        assert found["pools"] == [name for name in names if family in name]
        assert len(found["expert_errors"]) == len(plain.metrics["families"][family]["expert_errors"])
        assert 0 < found["relative_error"] < found["init"]["relative_error"] < 1
        assert found["bank"] == (9 if "share" in str(options) else 3)
    stored = read_directory(trip.out)
    atoms = sum(tensor.shape[0] for name, tensor in stored.items() if name.endswith(".atoms"))
    assert atoms == 9
    assert trip.metrics["ratio"]["touched"] == pytest.approx(plain.metrics["ratio"]["touched"], rel=0.02)
    if layout == "olmoe":
        load_plain(trip.dense)


def test_families_that_share_no_fused_tensor_with_others(trips: Callable[..., Trip]) -> None:
    trip = trips("granitemoe", "--families", "down,up", "--share-families")
    check_round_trip(trip)
    assert list(trip.metrics["pools"]) == ["down+up"]


@pytest.mark.parametrize("shards", [1, 2])
def test_layers_past_the_last_are_left_alone(shards: int, tmp_path: Path) -> None:
    source = make_tiny("deepseek_v3", tmp_path / "source", shards=shards)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    file = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    extra = {f"model.layers.{layers}.eh_proj.weight": torch.randn(64, 128, generator=generator).bfloat16()}
    for expert, part in itertools.product(range(8), FAMILIES):
        shape = (64, 32) if part == "down" else (32, 64)
        name = f"model.layers.{layers}.mlp.experts.{expert}.{part}_proj.weight"
        extra[name] = torch.randn(shape, generator=generator).bfloat16()
    save_file({**tensors, **extra}, file, metadata={"format": "pt"})
    if shards > 1:
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"].update(dict.fromkeys(extra, file.name))
        path.write_text(json.dumps(index))
    trip = travel(tmp_path, source, *SMALL_OPTIONS, *ALL)
    check_round_trip(trip)
    assert sum(trip.metrics["families"]["gate"]["support_histogram"]) == 2 * 8
    assert not set(extra) & set(dense_experts(trip.out))
    assert set(extra) <= set(read_directory(trip.out))


def test_a_trained_mixture(tiny_olmoe: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_olmoe, source)
    trip = travel(
        tmp_path,
        source,
        "--rank",
        "0.75",
        "--outer-loops",
        "3",
        "--codes",
        "nnls",
        "--method",
        "ts-pca",
        *WEIGHTS_ONLY_OPTIONS,
    )
    check_round_trip(trip)
    for family in trip.metrics["families"].values():
        assert family["relative_error"] < 0.7 * family["init"]["relative_error"]
    load_plain(trip.dense)
    found = evaluate(trip.out, against=trip.source, max_tokens=2048)
    assert found.reference_perplexity is not None
    assert found.perplexity < 10 * found.reference_perplexity
