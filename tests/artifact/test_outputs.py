"""What a compression leaves: metrics, companions, the same bytes each time, and the effect of its settings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS, seed_task  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.artifact.autoload import source_config  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.seeds import ts_pca  # noqa: E402
from globe.seeds.proxies import scan, split_rows  # noqa: E402
from trips import (  # noqa: E402
    SMALL,
    SMALL_OPTIONS,
    TEXT,
    Trip,
    digests,
    load_plain,
    read_directory,
    run_cli,
)


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
        assert set(stage) == {"name", "seconds", "bytes_read", "bytes_sent", "peak_rss_bytes", "resumed"} | counted
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
    first = digests(tmp_path / "one")
    assert first == digests(tmp_path / "two")
    assert first != digests(tmp_path / "other")


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
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_progress_goes_to_stderr_and_json_alone_to_stdout(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source")
    command = [sys.executable, "-m", "globe", "compress", source, tmp_path / "out", *SMALL_OPTIONS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) >= {"output", "families", "ratio", "stages", "settings", "source"}
    assert "gate: loops" in done.stderr


def test_overwrite_replaces_a_finished_output(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source", shards=2)
    compress(source, tmp_path / "out", Settings(**SMALL))
    first = digests(tmp_path / "out")
    single = make_tiny("olmoe", tmp_path / "single")
    compress(single, tmp_path / "out", Settings(**SMALL), overwrite=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert digests(tmp_path / "out") != first
    export(tmp_path / "out", tmp_path / "dense")
    load_plain(tmp_path / "dense")


@pytest.mark.parametrize("codes", ["entmax", "nnls"])
def test_no_loops_leaves_seeds_and_nnls_codes(codes: str, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    options = {"rank": 0.5, "bank_size": 4, "outer_loops": 0, "method": "ts-pca", "device": "cpu", **WEIGHTS_ONLY}
    settings = Settings(**options, codes=codes)  # type: ignore[arg-type]
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
