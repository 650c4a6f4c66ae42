"""C++ projects find the library in the wheel, in a copy of it elsewhere, and in an install prefix."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import globe
import libglobe
from checkpoints import make_tiny
from families import WEIGHTS_ONLY
from globe.artifact.factored import open_factored
from globe.errors import GlobeError
from globe.kernels import compose

EXAMPLES = Path(__file__).parent.parent / "cpp" / "examples"
RUST = Path(__file__).parent / "libglobe.rs"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_examples(cmake_dir, build, *options):
    run("cmake", "-S", EXAMPLES, "-B", build, "-G", "Ninja", f"-Dglobe_DIR={cmake_dir}", *options)
    run("cmake", "--build", build)
    return build


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("factored")
    source = make_tiny("olmoe", directory / "source")
    globe.compress(source, directory / "out", globe.Settings(outer_loops=1, **WEIGHTS_ONLY))
    return open_factored(directory / "out")


def installed(where):
    """Return the directory of globeConfig.cmake in the wheel, or in the prefix of a `cmake --install`."""
    if where == "wheel":
        return Path(globe.get_cmake_dir())
    if not os.environ.get("GLOBE_PREFIX"):
        pytest.skip("set GLOBE_PREFIX to the prefix of a `cmake --install`")
    (config,) = Path(os.environ["GLOBE_PREFIX"]).rglob("globeConfig.cmake")
    return config.parent


@pytest.fixture(scope="module", params=["wheel", "prefix"])
def examples(request, tmp_path_factory):
    return build_examples(installed(request.param), tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("family", ["gate", "up"])
def test_example_composes_the_bits_of_the_kernel(examples, factored, family, tmp_path):
    bank = factored.bank(family)
    expected = compose(bank.codes, bank.atoms.numpy().astype(ml_dtypes.bfloat16), dtype=np.float32)
    for row in (0, len(expected) - 1):
        place = (row // 8, row % 8)
        shown = run(examples / "compose_expert", factored.directory, family, *place, tmp_path / "mixture")
        found = np.fromfile(tmp_path / "mixture", dtype=np.float32).reshape(expected[row].shape)
        assert np.array_equal(found.view(np.uint32), expected[row].view(np.uint32))
        assert "{} x {} float32".format(*found.shape) in shown


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        (("down", "0", "0"), 1, "matrix is dense"),
        (("gate", "2", "0"), 1, "layer: found 2"),
        (("gate", "0", "8"), 1, "expected 0 to 7"),
        (("gate", "0"), 2, "usage"),
    ],
)
def test_example_refuses(examples, factored, place, status, message, tmp_path):
    command = [examples / "compose_expert", factored.directory, *place, tmp_path / "mixture"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr
    assert not (tmp_path / "mixture").exists()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32).tofile(path)
    return path


def through_python(factored, tokens):
    opened, rows = libglobe.Checkpoint(factored.directory), np.fromfile(tokens, np.float32).reshape(-1, 64)
    places = [(layer, expert) for layer in opened.layers() for expert in range(opened.experts(layer))]
    return b"".join(opened.forward(place, rows).tobytes() for place in places)


@pytest.mark.parametrize("language", ["run_expert", "run_expert_c"])
def test_experts_have_the_same_bits_from_c_and_python(examples, language, factored, tokens, tmp_path):
    run(examples / language, factored.directory, tokens, tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == through_python(factored, tokens)
    done = subprocess.run([examples / language, tmp_path, tokens, tmp_path / "not"], capture_output=True, text=True)
    assert done.returncode == 1 and "no globe.json found" in done.stderr


def test_experts_have_the_same_bits_from_rust(factored, tokens, tmp_path):
    if shutil.which("rustc") is None:
        pytest.skip("rustc is not installed")
    library = libglobe.path().parent
    linked = ("-L", library, "-C", f"link-arg=-Wl,-rpath,{library}")
    run("rustc", "--edition", "2021", "-O", *linked, "-o", tmp_path / "client", RUST)
    run(tmp_path / "client", factored.directory, tokens, tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == through_python(factored, tokens)


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_pkg_config_finds_the_library_wherever_it_is(kind, factored, tokens, tmp_path):
    if shutil.which("pkg-config") is None or shutil.which("cc") is None:
        pytest.skip("pkg-config or cc is not installed")
    package = installed("wheel").parents[2]
    for part in ("include", "lib"):
        shutil.copytree(package / part, tmp_path / part)
    if kind == "static":
        (tmp_path / "lib" / libglobe.path().name).unlink()
    environment = {**os.environ, "PKG_CONFIG_PATH": str(tmp_path / "lib" / "pkgconfig")}
    command = ["pkg-config", "--cflags", "--libs", *(["--static"] if kind == "static" else []), "globe"]
    flags = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()
    rpath = f"-Wl,-rpath,{tmp_path / 'lib'}"
    run("cc", EXAMPLES / "run_expert_c.c", "-o", tmp_path / "client", *flags, rpath)
    run(tmp_path / "client", factored.directory, tokens, tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == through_python(factored, tokens)


def compilers():
    pairs = [("g++", "gcc"), ("clang++", "clang")]
    return [pair for pair in pairs if all(map(shutil.which, pair))]


@pytest.mark.parametrize("standard", ["c++17", pytest.param("c++20", marks=pytest.mark.slow), "c++23", "c11"])
def test_headers_are_clean(standard, tmp_path):
    if not compilers():
        pytest.skip("neither GCC nor Clang is installed")
    include = installed("wheel").parents[2] / "include"
    strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Wshadow", "-Werror", f"-I{include}"]
    for cxx, c in compilers():
        plain = standard.startswith("c1")
        used = standard.replace("23", "2b")  # as GCC and Clang of both sides of the standard call it
        for header in sorted((include / "globe").glob("*.h" if plain else "*.h*")):
            source = tmp_path / ("one.c" if plain else "one.cpp")
            source.write_text(f'#include "globe/{header.name}"\nint main(void);\n')
            run(c if plain else cxx, f"-std={used}", *strict, source)


def test_the_installed_files_can_be_moved(tmp_path):
    package = installed("wheel").parents[2]
    for part in ("include", "lib"):
        shutil.copytree(package / part, tmp_path / "moved" / part)
    for file in (tmp_path / "moved" / "lib" / "cmake").rglob("*.cmake"):
        assert str(package) not in file.read_text(encoding="utf-8")
    assert (build_examples(tmp_path / "moved" / "lib" / "cmake" / "globe", tmp_path / "build") / "run_expert").exists()


def test_a_version_that_is_not_compatible_is_refused(tmp_path):
    text = (EXAMPLES / "CMakeLists.txt").read_text(encoding="utf-8")
    (tmp_path / "CMakeLists.txt").write_text(text.replace("globe 0.1", "globe 0.2"), encoding="utf-8")
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", f"-Dglobe_DIR={globe.get_cmake_dir()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'compatible with requested version "0.2"' in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "command", [["-m", "globe", "--cmake-dir"], ["-c", "import globe; print(globe.get_cmake_dir())"]]
)
def test_prints_the_directory(command):
    directory = run(sys.executable, *command).rstrip("\n")
    assert directory == globe.get_cmake_dir()
    assert (Path(directory) / "globeConfig.cmake").is_file()


def test_a_package_without_the_library_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(globe, "__path__", [str(tmp_path)])
    with pytest.raises(GlobeError, match=r"globeConfig\.cmake: not found in .*; install the package again"):
        globe.get_cmake_dir()


def test_recipes_are_of_this_version():
    packaging = Path(__file__).parent.parent / "packaging"
    if not packaging.is_dir():
        pytest.skip("the sources of the recipes are not here")
    assert json.loads((packaging / "vcpkg" / "globe" / "vcpkg.json").read_text())["version"] == globe.__version__
    assert f'version = "{globe.__version__}"' in (packaging / "conan" / "conanfile.py").read_text(encoding="utf-8")
    assert f"VERSION {globe.__version__} " in (EXAMPLES.parents[1] / "CMakeLists.txt").read_text(encoding="utf-8")
