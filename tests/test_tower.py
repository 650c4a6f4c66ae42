"""The rooms of the package (docs/map.md): imports run down the tower, and what travels together travels whole."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_layers import PACKAGE, imported_modules

# From the roof to the ground; the modules at the ground belong to no folder.
TOWER = (
    "cli",
    "demo",
    "pipeline",
    "report",
    "healing",
    "evaluation",
    "hf",
    "artifact",
    "choice",
    "correction",
    "fit",
    "seeds",
    "statistics",
    "sizes",
    "runs",
    "compute",
    "checkpoint",
    "autograd",
    "kernels",
    "settings",
    "machine",
    "ground",
)
GROUND = {"errors", "_version", "embedding", "_native"}
DOORS = {"__init__", "__main__"}  # the face of the package and `python -m globe` lead to every room
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in DOORS or path.parent != PACKAGE)

# More than five parameters, each for its reason; a module stands for all its functions.
MANY = {
    "globe.cli.foreseeing": "click hands a command its options one by one",
    "globe.cli.healing": "click hands a command its options one by one",
    "globe.cli.making": "click hands a command its options one by one",
    "globe.cli.using": "click hands a command its options one by one",
    "globe.kernels": "kernels take arrays, and where to put the result",
    "globe.report.charts": "a drawing's own options, by keyword",
    "globe.artifact.push.push": "public: globe.push",
    "globe.evaluation.evaluate.evaluate": "public: globe.evaluate",
    "globe.evaluation.evaluate.evaluate_texts": "public: globe.evaluate on several texts",
    "globe.evaluation.perplexity.evaluate_models": "public: judges models that are loaded already",
    "globe.evaluation.harness.evaluate_tasks": "public: lm-eval's tasks",
    "globe.healing.heal.heal": "public: globe.heal",
    "globe.hf.load.load": "public: globe.load",
    "globe.hf.quantizer.GlobeConfig": "transformers reads it from config.json",
    "globe.hf.save.save_pretrained": "transformers calls it so",
    "globe.pipeline.batch.batch": "public: globe.batch",
    "globe.pipeline.compare.compare": "public: globe.compare",
    "globe.pipeline.compress.compress": "public: globe.compress",
    "globe.statistics.calibrate.calibrate": "public: globe.calibrate",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES} | {f"globe.{name}" for name in GROUND}


def room_of(module: str) -> str:
    top = module.split(".")[1]
    return "ground" if top in GROUND else top


def imported_rooms(path: Path) -> set[tuple[str, str]]:
    """The modules of the package that a file imports, with their rooms."""
    found = set()
    for name in imported_modules(path):
        while name not in MODULES and name.startswith("globe."):
            name = name.rpartition(".")[0]  # a function of a module
        if name in MODULES:
            found.add((name, room_of(name)))
    return found


def file_of(module: str) -> str:
    place = PACKAGE.parent / module.replace(".", "/")
    return f"{place.relative_to(PACKAGE)}/__init__.py" if place.is_dir() else f"{place.relative_to(PACKAGE)}.py"


def runs_up(path: Path) -> list[str]:
    mine = TOWER.index(room_of(module_of(path)))
    return [
        f"{path.relative_to(PACKAGE)} ({TOWER[mine]}) imports {file_of(name)} ({room})"
        for name, room in sorted(imported_rooms(path))
        if TOWER.index(room) < mine
    ]


def test_every_module_has_its_room():
    assert len(FILES) > 100
    assert {room_of(module) for module in MODULES} == set(TOWER)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_down_the_tower(path):
    assert not runs_up(path)


def test_nothing_imports_the_face_of_the_package():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert "globe" not in [alias.name for alias in node.names], path
            if isinstance(node, ast.ImportFrom) and node.module == "globe":
                assert {f"globe.{alias.name}" for alias in node.names} <= MODULES | {"globe.kernels"}, path


def test_an_import_that_runs_up_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("test_tower.PACKAGE", tmp_path / "globe")
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path / "globe")
    path = tmp_path / "globe" / "fit" / "low.py"
    path.parent.mkdir(parents=True)
    path.write_text("from globe.pipeline.compress import compress\n", encoding="utf-8")
    assert runs_up(path) == ["fit/low.py (fit) imports pipeline/compress.py (pipeline)"]


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """The functions and methods of a file by their qualified names, with their parameters."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
                yield name, [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]
            yield from functions(node, name)
        else:
            yield from functions(node, prefix)


def excused(name: str) -> set[str]:
    return {known for known in MANY if name == known or name.startswith(f"{known}.")}


def test_no_function_takes_more_than_five_things():
    many = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        many.update({name: told for name, told in functions(tree, module_of(path)) if len(told) > 5})
    assert not {name: told for name, told in many.items() if not excused(name)}
    assert set().union(*map(excused, many)) == set(MANY)  # no exception that nothing needs


def test_tests_lie_in_rooms():
    held = {path.name for path in Path(__file__).parent.iterdir() if list(path.glob("test_*.py"))}
    assert held <= {*TOWER, "benchmarks"}


def rows_of_the_map(columns: int) -> list[list[str]]:
    """The lines of the map's table of so many columns, without its head."""
    lines = (PACKAGE.parents[1] / "docs" / "map.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if len(row) == columns and set(row[0]) != {"-"} and row[0] not in ("room", "section")]


def test_the_map_has_every_room_in_order():
    named = [row[0].replace("`", "") for row in rows_of_the_map(2)]
    assert [name.rstrip("/").removesuffix(".py") for name in named[1:]] == list(reversed(TOWER[:-1]))


@pytest.mark.parametrize("row", rows_of_the_map(4), ids=lambda row: f"{row[0]} {row[3]}")
def test_the_map_leads_to_what_is_there(row):
    _, _, file, name = row
    value = importlib.import_module("globe." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    assert callable(value) and (PACKAGE / file).is_file()


def test_the_map_covers_every_section_of_the_specification():
    named = {row[0].partition(".")[0] for row in rows_of_the_map(4)}
    assert named == {"0", "beyond", *"ABCDEFGHIJKLM"}
