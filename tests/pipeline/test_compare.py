"""`globe compare` on a tiny checkpoint, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from checkpoints import make_tiny
from families import WEIGHTS_ONLY, planted, write_checkpoint
from globe import Settings, compare, compress
from globe.cli import cli
from globe.errors import GlobeError, UsageError
from globe.pipeline.compare import run_one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("compare") / "model")


def test_the_table_of_the_command_line(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "found.json"
    before = sorted(model.iterdir())
    options = ["--methods", "grouped-subspace,auto", "--families", "gate", "--rank", "16", "--bank-size", "3"]
    ran = CliRunner().invoke(cli, ["compare", str(model), *options, "--outer-loops", "2,0", "--out", str(saved)])
    assert ran.exit_code == 0, ran.output
    assert "grouped-subspace" in ran.stdout and "loop s" in ran.stdout
    found = json.loads(saved.read_text(encoding="utf-8"))
    rows = found["rows"]
    assert [(row["method"], row["outer_loops"]) for row in rows] == [
        ("grouped-subspace", 0), ("grouped-subspace", 2), ("auto", 0), ("auto", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["family"] == "gate" and 0 < row["relative_error"] < 1 and row["seed_seconds"] > 0
        assert 0 <= row["explained_variance"] <= 1 and 0 <= row["proxy_error"] <= 1 and row["support_median"] >= 1
        assert row["peak_rss_bytes"] > 100 << 20
    assert rows[0]["support_median"] == 1 and rows[0]["seconds"] == 0 < rows[1]["seconds"]
    assert rows[1]["relative_error"] <= rows[0]["relative_error"]
    assert sorted(model.iterdir()) == before and [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_errors_are_those_that_compress_would_deliver(model: Path, tmp_path: Path) -> None:
    base: dict[str, Any] = {"families": ["gate"], "rank": 16, "bank_size": 3, "codes": "nnls", **WEIGHTS_ONLY}
    for method in ("ts-pca", "grouped-subspace"):
        rows = run_one(model, Settings(**base, method=method, outer_loops=3), [0, 1, 3])  # type: ignore[arg-type]
        for row in rows:
            settings = Settings(**base, method=method, outer_loops=row["outer_loops"])  # type: ignore[arg-type]
            done = compress(model, tmp_path / f"{method}-{row['outer_loops']}", settings).metrics["families"]["gate"]
            assert row["relative_error"] == pytest.approx(done["relative_error"], rel=5e-3)
            seeds = done["init"]
            assert row["explained_variance"] == pytest.approx(seeds["explained_variance"], rel=1e-6)
            assert done["seeds"] == {"chosen": method, "why": "asked for"}
            assert len(seeds["support_histogram"]) == 4 and len(seeds["atom_popularity"]) == 3
            assert seeds["atom_norm_max_deviation"] < 1e-5 and seeds["coherence"] >= 0 and seeds["seconds"] > 0


def test_settings_for_a_fit_that_is_corrected_are_compared_without(model: Path) -> None:
    settings = Settings(families=("gate",), rank=16, bank_size=3, correct="down")
    found = compare(model, ["left-gram"], settings, outer_loops=[0])
    assert [row["method"] for row in found["rows"]] == ["left-gram"] and "error" not in found["rows"][0]


def test_a_method_that_cannot_run_has_its_reason_in_the_table(tmp_path: Path) -> None:
    weights = planted(1, experts=8, p=24, d=32, rank=8, atoms=6)
    weights[3:] = 0
    model = write_checkpoint(tmp_path / "model", gate=weights, up=weights, down=weights.swapaxes(1, 2))
    options = ["--methods", "grouped-subspace", "--families", "gate", "--rank", "8", "--bank-size", "4"]
    ran = CliRunner().invoke(cli, ["compare", str(model), *options, "--outer-loops", "0"])
    assert ran.exit_code == 0, ran.output
    assert "grouped-subspace: family gate: 3 experts are not zero, fewer than the 4 atoms asked for" in ran.stdout


def test_auto_in_metrics(model: Path, tmp_path: Path) -> None:
    settings = Settings(rank=16, bank_size=3, families=("gate",), method="auto", outer_loops=1, calibration_tokens=1024)
    told = compress(model, tmp_path / "out", settings).metrics["families"]["gate"]["seeds"]
    assert told["tries"][0]["method"] == "ts-pca" and told["why"].startswith("relative error")
    best = min(tried["relative_error"] for tried in told["tries"] if tried["error"] is None)
    assert next(t for t in told["tries"] if t["method"] == told["chosen"])["relative_error"] == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--methods", "ts-pca,magic"], "method 'magic' is not known; expected one of ts-pca"),
        (["MODEL", "--methods", ""], "method '' is not known"),
        (["MODEL", "--outer-loops", "0,many"], "--outer-loops is '0,many'; expected counts such as 0,6"),
        (["MODEL", "--outer-loops", "-1"], "no count negative"),
        (["MODEL", "--bank-size", "1000"], "bank size is 1000; expected 1 to the family's 16 experts"),
        (["nowhere"], "nowhere: no such directory"),
        (["MODEL", "--out", "nowhere/found.json"], "nowhere: no such directory; expected one to write found.json in"),
    ],
)
def test_refusals(arguments: list[str], message: str, model: Path) -> None:
    ran = CliRunner().invoke(cli, ["compare", *[str(model) if word == "MODEL" else word for word in arguments]])
    assert isinstance(ran.exception, GlobeError) and message in str(ran.exception) and not ran.stdout
    with pytest.raises(UsageError, match="expected one of each at least"):
        compare(model, [])
