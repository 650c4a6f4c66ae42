"""Imports point one way: command line, stages, kernels, native core."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import globe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "globe"
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))


def imported_modules(path):
    """Yield every absolute module name a file imports, `from a import b` as both a and a.b."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            yield base
            for alias in node.names:
                yield f"{base}.{alias.name}"


def test_there_are_kernels_to_look_at():
    assert len(KERNELS) >= 5


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_no_torch_no_files_and_no_stages(path):
    for name in imported_modules(path):
        top = name.split(".")[0]
        assert top not in {"torch", "safetensors", "transformers", "huggingface_hub", "click", "rich"}, name
        if top == "globe" and name != "globe":
            assert name.startswith(("globe.kernels", "globe._native", "globe.machine.processors")), name


def test_the_command_line_starts_without_torch():
    code = "import sys, globe.cli; sys.exit(bool({'torch', 'scipy', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_core_includes_no_python():
    files = [path for path in (ROOT / "cpp").rglob("*") if path.suffix in {".hpp", ".cpp"}]
    assert files
    for path in files:
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE):
            assert not re.match(r"Python|pybind11|numpy|nanobind|boost/python", header), f"{path}: {header}"


@pytest.fixture(scope="module")
def object_files():
    """List every object file of the installed library: its name, and [kind, symbol] pairs as nm shows them."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = Path(globe.get_cmake_dir()).parents[1] / "libglobe.a"
    blocks = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    return [(lines[0], [line.split()[-2:] for line in lines[1:]]) for lines in map(str.splitlines, blocks)]


def test_the_library_needs_no_python(object_files):
    assert not [name for _, symbols in object_files for _, name in symbols if re.match(r"_*Py[A-Z_]", name)]


def test_variants_share_nothing_but_their_table(object_files):
    """A weak symbol would let the linker put one variant's instructions into another (cpp/src/variant.hpp)."""
    variants = [symbols for file, symbols in object_files if "variant" in file]
    assert len(variants) >= 2
    for symbols in variants:
        shared = [name for kind, name in symbols if kind in "uvw" or (kind.isupper() and kind != "U")]
        assert len(shared) == 1 and shared[0].endswith("5tableE"), shared


def test_a_function_wins_over_its_module():
    code = "import globe.report.page, globe\nfrom globe.report import report\nassert globe.report is report\n"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("statement", ["import globe.kernels", "import globe"])
def test_importing_is_light(statement):
    code = f"{statement}\nimport sys\nprint(*[m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
