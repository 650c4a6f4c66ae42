"""The report of tiny outputs: what it reads, that the page is whole and refers to nothing, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import make_tiny
from displays import Lines
from globe import GlobeError, Settings, UsageError, compress, report
from globe.artifact.factored import open_factored
from globe.cli import cli
from globe.report.charts import Series, bars, heat_map, line
from globe.report.data import read_run
from globe.report.sections import course
from globe.report.svg import duration, escape, log_ticks, number, size, ticks

SMALL: dict[str, Any] = {
    "rank": 0.5,
    "bank_size": 4,
    "outer_loops": 2,
    "joint_steps": 5,
    "support": 2,
    "calibrate": "none",
    "device": "cpu",
}
CHARTS = ("by layer", "by expert", "Which layers use which atoms", "What layers share", "Support,", "Popularity",
          "Error over", "Temperature over", "Support over", "Time of each stage", "Peak memory")  # fmt: skip
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """An output of a tiny checkpoint, made once for the same arguments."""
    sources: dict[str, Path] = {}
    made: dict[str, Path] = {}

    def run(layout: str = "olmoe", **changed: Any) -> Path:
        if layout not in sources:
            sources[layout] = make_tiny(layout, tmp_path_factory.mktemp(layout) / "source")
        key = f"{layout} {sorted(changed.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("made") / "out"
            compress(sources[layout], made[key], Settings(**{**SMALL, **changed}))
        return made[key]

    return run


class Elements(HTMLParser):
    """What a browser would make of the tags: all that are opened are closed, and only shapes close themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self._see(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("meta", "circle", "line", "path", "rect"), tag
        self._see(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _see(self, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def check_page(path: Path) -> ElementTree.Element:
    page = path.read_text(encoding="utf-8")
    parser = Elements()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and parser.references and all(one.startswith("#") for one in parser.references)
    assert "://" not in page and "url(" not in page and "@import" not in page and "nan" not in re.findall(r"\w+", page)
    root = ElementTree.fromstring(page.partition("\n")[2])
    assert not [element for element in root.iter() if element.tag in ("script", "iframe", "link", "img", "object")]
    ids = [element.get("id") for element in root.iter("section")]
    assert ids == ["summary", "warnings", "experts", "banks", "costs", "settings"]
    assert {one[1:] for one in parser.references} == set(ids)
    for svg in root.iter("svg"):
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        for mark in svg.iter():
            for key, limit in (("x", width), ("cx", width), ("x2", width), ("y", height), ("cy", height)):
                assert -0.1 <= float(mark.get(key, 0)) <= limit + 0.1, ElementTree.tostring(mark)
    return root


def titles(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iterfind(".//figcaption/b")]


def test_compress_ends_with_the_report(make: Maker) -> None:
    out = make()
    root = check_page(out / "report.html")
    found = titles(root)
    for family in ("gate", "up"):
        assert f"Which layers use which atoms, {family}" in found and f"Relative error by expert, {family}" in found
    assert all(any(part in title for title in found) for part in CHARTS)
    words, metrics = " ".join(root.itertext()), json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for axis in ("touched", "experts", "checkpoint"):
        assert f"{metrics['ratio'][axis]:.3f}" in words
    assert metrics["source"]["fingerprint"] in words and "temperature_rate" in words and "No activation" in words
    assert not list(out.glob(".*"))


def test_the_same_page_each_time_and_no_other_file_touched(make: Maker) -> None:
    out = make()
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    page = (out / "report.html").read_bytes()
    assert report(out) == out / "report.html" and (out / "report.html").read_bytes() == page
    after = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"report.html"}


@pytest.mark.parametrize(
    ("layout", "changed"),
    [
        ("olmoe", {}),
        ("qwen3_moe", {"families": ("gate", "up", "down"), "solver": "alternate"}),  # a dense layer lies between
        ("granitemoe", {"families": ("up",), "outer_loops": 0}),
        ("olmoe", {"share_families": True, "codes": "signed"}),
        ("olmoe", {"scope": "layer", "codes": "nnls"}),
    ],
)
def test_what_is_read_is_what_was_stored(make: Maker, layout: str, changed: dict[str, Any]) -> None:
    out = make(layout, **changed)
    run, factored = read_run(out), open_factored(out)
    layers = [0, 2] if layout == "qwen3_moe" else [0, 1]
    for family in run.families:
        assert sorted(set(family.layers.tolist())) == layers
        errors, names = run.metrics["families"][family.name]["expert_errors"], factored.manifest["families"]
        grid, columns = family.grid(family.errors)
        assert columns == layers and grid.size == len(errors) and np.isfinite(grid).all()
        for tensor, numbers in names[family.name]["tensors"].items():
            layer = columns.index(int(tensor.split(".")[2]))
            expert = int(tensor.split(".")[5]) if ".experts." in tensor and len(numbers) == 1 else slice(None)
            if not changed.get("share_families") and changed.get("scope") != "layer":
                np.testing.assert_array_equal(np.atleast_1d(grid[expert, layer]), np.array(errors)[numbers])
        mean = family.by_layer(family.errors)[1]
        np.testing.assert_allclose(mean, grid.mean(0))
    assert sum(int(pool.held.sum()) for pool in run.pools) == sum(len(family.errors) for family in run.families)
    for pool in run.pools:
        codes = abs(factored.bank(pool.name).codes.toarray().astype(float))
        assert pool.users.sum(1).tolist() == pool.report["atom_popularity"]
        np.testing.assert_allclose(pool.weight.sum(0), 1)
        np.testing.assert_allclose(pool.weight @ pool.held, (codes / codes.sum(1, keepdims=True)).sum(0))
        np.testing.assert_allclose(np.diag(pool.alike()), 1)
        assert sorted(pool.order().tolist()) == list(range(pool.atoms))
    check_page(out / "report.html")


def test_weighted_errors_come_first(make: Maker) -> None:
    out = make(calibrate="pydoc", calibration_tokens=1024)
    run = read_run(out)
    for family in run.families:
        assert family.weighted is not None and family.weighted.shape == family.errors.shape
        assert family.weighted.min() <= family.report["weighted_error"] <= family.weighted.max()
    found = titles(check_page(out / "report.html"))
    first, second = (found.index(f"{kind} by layer") for kind in ("Activation-weighted error", "Relative error"))
    assert first < second


@pytest.mark.parametrize("changed", [{}, {"calibrate": "pydoc", "calibration_tokens": 1024}], ids=["plain", "metric"])
def test_the_course_of_a_joint_fit(changed: dict[str, Any], make: Maker) -> None:
    """It goes on from the seeds, with no loops: their error is the first one."""
    out = make(**changed)
    name = "activation-weighted error, joint fit" if changed else "relative error, joint fit"
    for pool in read_run(out).pools:
        found, lines = course(pool), pool.report["joint"]["history"]
        assert found[name] == [(one["evaluations"], one["error"]) for one in lines] and len(lines) > 2
        assert lines[0]["error"] == pool.report["init"]["relative_error"] > lines[-1]["error"]
        assert found["relative error, loops"] == found["held-out rows, loops"] == []
        assert found["temperature"] == [(one["evaluations"], one["temperature"]) for one in lines]
        assert found["support"] == [(one["evaluations"], one["support_median"]) for one in lines]
    told = "".join(check_page(out / "report.html").itertext())
    assert name in told and "error, loops" not in told


def test_the_course_of_loops(make: Maker) -> None:
    for pool in read_run(make(solver="alternate")).pools:
        found, lines = course(pool), pool.report["history"]
        wanted = [(0, pool.report["init"]["relative_error"]), *((one["loop"], one["relative_error"]) for one in lines)]
        assert found["relative error, loops"] == wanted and len(lines) == 2
        assert found["relative error, joint fit"] == []
    for pool in read_run(make(outer_loops=0)).pools:
        assert course(pool)["relative error, loops"] == [(0, pool.report["init"]["relative_error"])]


def test_two_runs_side_by_side(make: Maker, tmp_path: Path) -> None:
    first, second = make(), make(codes="nnls", families=("gate",), rank=0.25)
    ran = CliRunner().invoke(cli, ["report", str(first), str(second), "--output", str(tmp_path / "two.html"), "--json"])
    assert ran.exit_code == 0, ran.output
    page = Path(json.loads(ran.stdout)["report"])
    assert page == tmp_path / "two.html"
    root = check_page(page)
    marked = {row.find("th").text for row in root.iter("tr") if row.get("class") == "differs"}  # type: ignore[union-attr]
    assert marked == {"codes", "families", "rank"}
    assert titles(root).count("Which layers use which atoms, gate") == 2
    assert titles(root).count("Which layers use which atoms, up") == 1
    assert "not in this run" in "".join(root.itertext())
    assert ["".join(b.itertext()) for b in root.iter("span") if b.get("class") == "run r1"].count("B") > 5


def test_hostile_names_are_text(make: Maker, tmp_path: Path) -> None:
    out = shutil.copytree(make(), tmp_path / "<script>alert(1)<&script>\"'")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    metrics["source"]["path"] = '</style><script src="x">\x00]]>&amp;\ud800'
    metrics["device"] = "<img onerror=x>"
    metrics["stages"][0]["name"] = "</svg><b>" + 60 * "x"
    metrics["settings"]["<i>"] = "</table>"
    (out / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    words = "".join(check_page(report(out)).itertext())
    assert '</style><script src="x">�]]>&amp;�' in words and "<script>alert(1)<&script>" in words


def test_a_failing_report_loses_nothing(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    lines = Lines()

    def fail(*_: Any) -> str:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["globe.report"], "render", fail)
        compress(source, tmp_path / "out", Settings(**SMALL), progress=lines)
    assert "could not be drawn (ZeroDivisionError: planted)" in lines.lines[-1]
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "report.html").exists()
    assert compress(source, tmp_path / "out", Settings(**SMALL)).found  # and the next call draws it
    check_page(tmp_path / "out" / "report.html")
    compress(source, tmp_path / "out", Settings(**{**SMALL, "rank": 0.25}), overwrite=True)
    assert "16" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda metrics: metrics.pop("ratio"), "does not go with globe.json"),
        (lambda metrics: metrics["families"].pop("up"), "does not go with globe.json"),
        (lambda metrics: metrics["families"]["up"]["expert_errors"].pop(), "has errors of 15 experts, not of 16"),
        (lambda metrics: metrics.update(families=[]), "does not go with globe.json"),
    ],
)
def test_metrics_of_another_output_are_refused(make: Maker, tmp_path: Path, damage: Any, said: str) -> None:
    out = shutil.copytree(make(), tmp_path / "out")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    damage(metrics)
    (out / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    with pytest.raises(GlobeError, match=said):
        report(out)


def test_what_is_no_output_and_no_page_is_refused(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match="no globe.json found"):
        report(tmp_path)
    out = shutil.copytree(make(), tmp_path / "out")
    for name in ("config.json", "out"):
        with pytest.raises(UsageError, match="ends in .html"):
            report(out, output=tmp_path / name)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        report(out, output=tmp_path / "folder.html")
    with pytest.raises(GlobeError, match="cannot be written"):
        report(out, output=tmp_path / "absent" / "page.html")
    (out / "config.json").unlink()
    with pytest.raises(GlobeError, match="config.json is missing"):
        report(out)


def test_large_maps_stay_small_and_odd_values_are_drawn() -> None:
    large = heat_map("large", np.random.default_rng(0).random((256, 96)), range(256), range(96), "a", "l", (0.2, 0.5))
    assert large.count("<rect") == 1 and len(large) < 1_500_000
    for drawn in (
        large,
        heat_map("gaps", np.array([[np.nan, 1.0], [0.0, 2.0]]), range(2), [3, 7], "expert", "layer", ()),
        line("one point", [Series("a", [0], [0.5])], "x", "y"),
        line("nothing", [Series("a", [], [])], "x", "y"),
        line("gaps", [Series("a", [0, 1], [float("nan"), 1.0])], "x", "y", log=True),
        line("flat zero", [Series("a", [0, 1], [0.0, 0.0])], "x", "y"),
        bars("nothing", [], "x", "y"),
        bars("zeros", [0, 0], "x", "y", mark=(0, "target")),
    ):
        ElementTree.fromstring(drawn)


def test_numbers_and_ticks() -> None:
    assert [number(one) for one in (0, 0.09204854, 1234.5, 3e-9, 12.0, float("inf"))] == [
        "0", "0.09205", "1,234", "3.000e-09", "12", "–",
    ]  # fmt: skip
    assert [size(one) for one in (0, 999, 53084160, 2.5e9)] == ["0 B", "999 B", "53.1 MB", "2.5 GB"]
    assert [duration(one) for one in (0.0143, 59.94, 131.8, 7261)] == ["0.0143 s", "59.9 s", "2 min 12 s", "2 h 1 min"]
    assert ticks(0, 0.41) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and ticks(1, 1) == [1]
    assert log_ticks(0.005, 0.5) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert escape("<a b='\x1b'>") == "&lt;a b=&#x27;�&#x27;&gt;"
