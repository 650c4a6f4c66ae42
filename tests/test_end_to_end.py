"""From a dense checkpoint to a factored one and back, for every layout, against a plain NumPy reader."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402
from safetensors import deserialize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import LAYOUTS, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS, seed_task  # noqa: E402
from globe import Settings, compress, evaluate, export  # noqa: E402
from globe.autoload import source_config  # noqa: E402
from globe.checkpoint import FAMILIES, Checkpoint, read_layouts  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.proxies import scan, split_rows  # noqa: E402
from globe.seeds import ts_pca  # noqa: E402

TEXT = "A mixture holds many experts; a router chooses a few of them for every token. " * 4
REGISTERED = sorted(set(LAYOUTS) - {"llama4_text"})
FUSED = ("qwen3_5_moe", "granitemoe")
SMALL: dict[str, Any] = {"rank": 0.5, "bank_size": 3, "outer_loops": 2, "device": "cpu", **WEIGHTS_ONLY}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: its dtype name and shape, raw bytes, and its place among the file's tensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    def values(self) -> np.ndarray:
        if self.dtype == "BF16":
            return (np.frombuffer(self.raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        kinds = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
        return np.frombuffer(self.raw, kinds[self.dtype]).reshape(self.shape)


def read_directory(directory: Path) -> dict[str, Stored]:
    """Read every tensor of every safetensors file, in the order of their bytes."""
    tensors: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        entries = dict(deserialize(content))
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            entry = entries[name]
            tensors[name] = Stored(file.name, entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return tensors


def dense_experts(out: Path) -> dict[str, np.ndarray]:
    """Recompute A_i Σ_j α_ij B_j of every compressed tensor of OUT, in fp64 and from its files alone.

    A fused tensor comes back whole, with the half that was not compressed as it is stored.
    """
    stored = read_directory(out)
    manifest = json.loads((out / "globe.json").read_text(encoding="utf-8"))
    halves: dict[str, dict[str, np.ndarray]] = {}
    for family, described in manifest["families"].items():
        for tensor, numbers in described["tensors"].items():
            bank = described["banks"][tensor]
            part = {key: stored[f"globe.{bank}.{key}"].values() for key in ("atoms", "codes.indptr", "codes.indices")}
            atoms, values = part["atoms"].astype(np.float64), stored[f"globe.{bank}.codes.values"].values()
            lefts = stored[f"{tensor}.globe_{family}_left"].values().astype(np.float64)
            lefts = lefts if lefts.ndim == 3 else lefts[None]
            products = []
            for left, number in zip(lefts, numbers, strict=True):
                first, last = part["codes.indptr"][number : number + 2]
                mixture = sum(float(values[k]) * atoms[part["codes.indices"][k]] for k in range(int(first), int(last)))
                products.append(left @ mixture)
            stacked = np.stack(products)
            halves.setdefault(tensor, {})[family] = stacked.transpose(0, 2, 1) if family == "down" else stacked
            other = {"gate": "up", "up": "gate"}.get(family)
            rest = f"{tensor}.globe_{other}_dense"
            if rest in stored:
                halves[tensor][other] = stored[rest].values().astype(np.float64)
    return {
        tensor: np.concatenate([parts[family] for family in FAMILIES if family in parts], 1)
        for tensor, parts in halves.items()
    }


def run_cli(*arguments: object) -> dict[str, Any]:
    """Run a subcommand with --json -q, and return the one object on its stdout."""
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Trip:
    """A source, its factored directory, the dense export made after the source was moved away, and the metrics."""

    source: Path
    out: Path
    dense: Path
    metrics: dict[str, Any]
    exported: dict[str, Any]


def travel(root: Path, source: Path, *options: object) -> Trip:
    metrics = run_cli("compress", source, root / "out", *options)
    kept = source.rename(root / "kept")
    exported = run_cli("export", root / "out", root / "dense")
    return Trip(kept, root / "out", root / "dense", metrics, exported)


ALL = ("--families", "gate,up,down")
SMALL_OPTIONS = ("--rank", "0.5", "--bank-size", "3", "--outer-loops", "2", "--device", "cpu", *WEIGHTS_ONLY_OPTIONS)


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trip]:
    made: dict[tuple[Any, ...], Trip] = {}

    def make(layout: str, *options: object, dtype: str = "bfloat16", shards: int = 2) -> Trip:
        key = (layout, options, dtype, shards)
        if key not in made:
            root = tmp_path_factory.mktemp(layout)
            source = make_tiny(layout, root / "source", dtype=dtype, shards=shards)
            made[key] = travel(root, source, *SMALL_OPTIONS, *options)
        return made[key]

    return make


def check_round_trip(trip: Trip) -> None:
    """Check the export's structure, its untouched tensors, and its expert tensors against the NumPy reader."""
    before, after = read_directory(trip.source), read_directory(trip.dense)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert (after[name].file, after[name].dtype, after[name].shape) == (tensor.file, tensor.dtype, tensor.shape)
    experts = dense_experts(trip.out)
    assert experts
    for name, tensor in after.items():
        if name not in experts:
            assert tensor.raw == before[name].raw, name
            continue
        wanted = experts[name].reshape(tensor.shape)
        step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}[tensor.dtype]
        slack = 1e-6 * np.abs(wanted).max() + 1.01 * step * np.abs(wanted)
        assert (np.abs(tensor.values().astype(np.float64) - wanted) <= slack).all(), name
    index = "model.safetensors.index.json"
    assert (trip.dense / index).exists() == (trip.source / index).exists()
    if (trip.source / index).exists():
        ours, theirs = (json.loads((place / index).read_text()) for place in (trip.dense, trip.source))
        assert ours["metadata"] == theirs["metadata"]
        assert ours["weight_map"] == theirs["weight_map"]
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (trip.dense, trip.source))
    assert ours == theirs
    assert (trip.dense / "tokenizer.json").read_bytes() == (trip.source / "tokenizer.json").read_bytes()
    assert trip.exported["tensors"] == len(before)
    assert trip.exported["bytes"] == sum(len(tensor.raw) for tensor in before.values())
    assert not [entry for entry in trip.out.iterdir() if entry.name.startswith(".")]


def relative_errors(trip: Trip) -> dict[str, float]:
    """Σ‖W − Ŵ‖² / Σ‖W‖² of each family, from the files of source and OUT."""
    source, experts = read_directory(trip.source), dense_experts(trip.out)
    manifest = json.loads((trip.out / "globe.json").read_text(encoding="utf-8"))
    found = {}
    for family, described in manifest["families"].items():
        error = energy = 0.0
        for tensor in described["tensors"]:
            weights = source[tensor].values().astype(np.float64)
            fitted = experts[tensor].reshape(weights.shape)
            if weights.ndim == 3 and family != "down":
                half = weights.shape[1] // 2
                rows = slice(0, half) if family == "gate" else slice(half, None)
                weights, fitted = weights[:, rows], fitted[:, rows]
            error += float(((weights - fitted) ** 2).sum())
            energy += float((weights**2).sum())
        found[family] = error / energy
    return found


def load_plain(directory: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not found[problem], problem
    return model


def weight_digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.glob("*.safetensors*"))
    }


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


def test_metrics_have_what_was_promised(trips: Callable[..., Trip]) -> None:
    trip = trips("olmoe")
    metrics = json.loads((trip.out / "metrics.json").read_text(encoding="utf-8"))
    assert {**metrics, "output": str(trip.out)} == trip.metrics
    for name in ("gate", "up"):
        family = metrics["families"][name]
        assert 0 < family["relative_error"] < 1
        assert 0 < family["proxy_error"] <= 1
        assert 0 < family["init"]["proxy_error"] <= 1
        assert 0 < family["init"]["relative_error"] < 1
        assert 0 < family["explained_variance"] <= 1
        assert 1 <= family["support_median"] <= 3
        assert len(family["support_histogram"]) == 4 and sum(family["support_histogram"]) == 16
        assert len(family["atom_popularity"]) == 3
        assert sum(family["atom_popularity"]) == sum(i * n for i, n in enumerate(family["support_histogram"]))
        assert family["coherence"] >= 0
        assert 0 <= family["atom_norm_max_deviation"] < 0.01
        assert [record["loop"] for record in family["history"]] == [1, 2]
    ratio = metrics["ratio"]
    assert 0 < ratio["touched"] < ratio["experts"] < ratio["checkpoint"] < 1
    assert len(metrics["stages"]) >= 6
    for stage in metrics["stages"]:
        counted = {"passes"} if ":" in stage["name"] else set()
        assert set(stage) == {"name", "seconds", "bytes_read", "peak_rss_bytes", "resumed"} | counted
        assert not stage["resumed"]
        assert stage["seconds"] >= 0 and stage["peak_rss_bytes"] > 1 << 20
    passes = {stage["name"]: stage.get("passes") for stage in metrics["stages"]}
    assert passes["gate: scan"] == 1 and passes["gate: loops"] == 3
    assert metrics["settings"] == Settings(**SMALL).as_dict()
    assert metrics["source"]["layout"] == "olmoe"
    assert len(metrics["source"]["fingerprint"]) == 64


def test_output_holds_its_companions(trips: Callable[..., Trip]) -> None:
    trip = trips("olmoe")
    manifest = json.loads((trip.out / "globe.json").read_text(encoding="utf-8"))
    assert manifest["format_version"] == 2
    assert manifest["families"]["up"]["banks"] == dict.fromkeys(manifest["families"]["up"]["tensors"], "up")
    assert manifest["banks"]["up"] == {"experts": 16, "rank": 16, "bank": 3}
    assert manifest["settings"]["bank_size"] == 3
    assert manifest["source"]["fingerprint"] == Checkpoint(trip.source).fingerprint()
    assert (trip.out / "tokenizer.json").read_bytes() == (trip.source / "tokenizer.json").read_bytes()
    card = (trip.out / "README.md").read_text(encoding="utf-8")
    assert "relative error" in card.lower()
    config = json.loads((trip.out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "globe"
    assert source_config(config) == json.loads((trip.source / "config.json").read_text(encoding="utf-8"))


def test_ratio_is_that_of_the_bytes_on_disk(trips: Callable[..., Trip]) -> None:
    trip = trips("qwen2_moe")
    before = sum(len(tensor.raw) for tensor in read_directory(trip.source).values())
    after = sum(len(tensor.raw) for tensor in read_directory(trip.out).values())
    assert trip.metrics["ratio"]["checkpoint"] == pytest.approx(after / before, rel=1e-4)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source", shards=2)
    settings = Settings(**SMALL, selector="random", seed=4)
    compress(source, tmp_path / "one", settings)
    compress(source, tmp_path / "two", settings)
    compress(source, tmp_path / "other", Settings(**SMALL, selector="random", seed=5))
    first = weight_digests(tmp_path / "one")
    assert first == weight_digests(tmp_path / "two")
    assert first != weight_digests(tmp_path / "other")


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source")
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, "-m", "globe", "compress", source, tmp_path / name, *SMALL_OPTIONS, "--threads", "1",
             "--json", "-q"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["output"] == str(tmp_path / name)
        assert done.stderr == ""
    assert weight_digests(tmp_path / "one") == weight_digests(tmp_path / "two")


def test_progress_goes_to_stderr_and_json_alone_to_stdout(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source")
    command = [sys.executable, "-m", "globe", "compress", source, tmp_path / "out", *SMALL_OPTIONS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) >= {"output", "families", "ratio", "stages", "settings", "source"}
    assert "gate: loops" in done.stderr


def test_overwrite_replaces_a_finished_output(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source", shards=2)
    compress(source, tmp_path / "out", Settings(**SMALL))
    first = weight_digests(tmp_path / "out")
    single = make_tiny("olmoe", tmp_path / "single")
    compress(single, tmp_path / "out", Settings(**SMALL), overwrite=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert weight_digests(tmp_path / "out") != first
    export(tmp_path / "out", tmp_path / "dense")
    load_plain(tmp_path / "dense")


@pytest.mark.parametrize("codes", ["entmax", "nnls"])
def test_no_loops_leaves_seeds_and_nnls_codes(codes: str, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    settings = Settings(rank=0.5, bank_size=4, outer_loops=0, codes=codes, device="cpu", **WEIGHTS_ONLY)
    found = compress(source, tmp_path / "out", settings).metrics["families"]["gate"]
    assert found["history"] == []
    assert found["relative_error"] == pytest.approx(found["init"]["relative_error"], rel=5e-3)
    family = Checkpoint(source).family("gate")
    rows = split_rows(family.p, 16, scan(family, settings, lambda steps: None).row_energy, settings)
    seeds = ts_pca(seed_task(family, rows, 4))
    wanted = seeds.codes
    stored = {key: tensor.values() for key, tensor in read_directory(tmp_path / "out").items() if "globe.gate" in key}
    codes_found = np.zeros_like(wanted)
    for i in range(len(wanted)):
        span = slice(*stored["globe.gate.codes.indptr"][i : i + 2])
        codes_found[i, stored["globe.gate.codes.indices"][span]] = stored["globe.gate.codes.values"][span]
    filled = wanted.max(1) > 0
    np.testing.assert_allclose(codes_found[filled], wanted[filled], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stored["globe.gate.atoms"], seeds.bank.numpy(), rtol=2.0**-7, atol=1e-6)


def test_seeds_that_see_all_rows_leave_none_to_hold_out(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    for method, held in (("ts-pca", 1), ("grouped-subspace", 0)):
        settings = Settings(**{**SMALL, "bank_size": 4, "method": method})
        found = compress(source, tmp_path / method, settings).metrics["families"]["gate"]
        assert found["validation_rows"] == held
        assert [record["validation_error"] is None for record in found["history"]] == [not held] * 2


def test_simplex_seeds_sum_to_one(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    compress(source, tmp_path / "out", Settings(**{**SMALL, "outer_loops": 0}, init_codes="simplex"))
    stored = read_directory(tmp_path / "out")
    indptr, values = (stored[f"globe.up.codes.{part}"].values() for part in ("indptr", "values"))
    np.testing.assert_allclose(np.add.reduceat(values, indptr[:-1]), 1, rtol=1e-6)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source")


@pytest.mark.parametrize("codes", ["entmax", "sparsemax", "nnls", "simplex"])
@pytest.mark.parametrize("mod", ["exact", "aligned", "fixed"])
def test_every_dictionary_step_with_every_code(mod: str, codes: str, olmoe: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {**SMALL, "bank_size": 6, "outer_loops": 4, "support": 3}
    settings = Settings(**small, mod=mod, codes=codes)
    result = compress(olmoe, tmp_path / "out", settings)
    for family in result.metrics["families"].values():
        seeds, loops = family["init"]["relative_error"], [record["relative_error"] for record in family["history"]]
        assert len(loops) == 4 or family["stopped"] == "plateau"
        assert all(math.isfinite(error) for error in loops)
        assert family["relative_error"] == pytest.approx(min([seeds, *loops]), rel=5e-3)
        if mod == "exact":
            assert family["relative_error"] < 0.95 * seeds
    if codes != "nnls" and mod == "exact":
        stored = read_directory(tmp_path / "out")
        indptr, values = (stored[f"globe.gate.codes.{part}"].values() for part in ("indptr", "values"))
        np.testing.assert_allclose(np.add.reduceat(values, indptr[:-1]), 1, rtol=1e-5)
        assert values.min() > 0


@pytest.mark.parametrize("selector", ["energy", "uniform", "random"])
def test_every_selector(selector: str, olmoe: Path, tmp_path: Path) -> None:
    found = compress(olmoe, tmp_path / "out", Settings(**SMALL, selector=selector)).metrics
    assert found["settings"]["selector"] == selector
    assert found["families"]["gate"]["relative_error"] < found["families"]["gate"]["init"]["relative_error"]


@pytest.mark.parametrize(
    ("option", "value", "status"),
    [("--method", "ts-pca", 2), ("--solver", "alternate", 2), ("--calibrate", "none", 1)],  # a file that is not there
)
def test_single_valued_options(option: str, value: str, status: int, olmoe: Path, tmp_path: Path) -> None:
    found = run_cli("compress", olmoe, tmp_path / "out", *SMALL_OPTIONS, option, value)
    assert found["settings"][option.removeprefix("--")] == value
    refused = CliRunner().invoke(cli, ["compress", str(olmoe), str(tmp_path / "no"), option, "other"])
    assert refused.exit_code == status
    assert not (tmp_path / "no").exists()


def test_inspect_agrees_with_what_compress_finds(olmoe: Path, tmp_path: Path) -> None:
    found = run_cli("inspect", olmoe)
    assert {name: (family["experts"], family["p"], family["d"]) for name, family in found["families"].items()} == {
        "gate": (16, 32, 64),
        "up": (16, 32, 64),
        "down": (16, 32, 64),
    }
    choice = next(choice for choice in found["choices"] if choice["ratio"]["touched"] < 1)
    made = run_cli(
        "compress", olmoe, tmp_path / "out", "--rank", choice["rank"], "--bank-size", choice["bank"],
        "--outer-loops", 0, *WEIGHTS_ONLY_OPTIONS,
    )  # fmt: skip
    assert made["ratio"]["touched"] == pytest.approx(choice["ratio"]["touched"], rel=0.05)


def test_eval_prints_one_object(trips: Callable[..., Trip], tmp_path: Path) -> None:
    trip = trips("olmoe")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    found = run_cli("eval", trip.out, "--against", trip.source, "--text", text, "--window", 64)
    assert found["perplexity"] > 1 and found["kl"] > 0 and 0 <= found["top1_agreement"] <= 1


def test_settings_from_a_file_with_options_on_top(olmoe: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("rank: 0.5\nbank_ratio: 0.25\nouter_loops: 1\ncodes: nnls\nl1: 0.01\n", encoding="utf-8")
    found = run_cli(
        "compress", olmoe, tmp_path / "out", "--config", config, "--bank-size", 3, "--seed", 7, *WEIGHTS_ONLY_OPTIONS
    )
    settings = found["settings"]
    assert (settings["codes"], settings["l1"], settings["outer_loops"]) == ("nnls", 0.01, 1)
    assert (settings["bank_size"], settings["bank_ratio"], settings["seed"]) == (3, None, 7)


def test_a_trained_mixture(tiny_olmoe: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_olmoe, source)
    trip = travel(tmp_path, source, "--rank", "0.75", "--outer-loops", "3", "--codes", "nnls", *WEIGHTS_ONLY_OPTIONS)
    check_round_trip(trip)
    for family in trip.metrics["families"].values():
        assert family["relative_error"] < 0.7 * family["init"]["relative_error"]
    load_plain(trip.dense)
    found = evaluate(trip.out, against=trip.source, max_tokens=2048)
    assert found.reference_perplexity is not None
    assert found.perplexity < 10 * found.reference_perplexity
