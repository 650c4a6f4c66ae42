"""C++ projects find the library in the wheel, in a copy of it elsewhere, and in an install prefix."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import globe
from checkpoints import make_tiny
from globe.artifact.factored import BANK_FILE, open_factored
from globe.errors import GlobeError
from globe.kernels import compose

EXAMPLES = Path(__file__).parent.parent / "cpp" / "examples"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_example(cmake_dir, build):
    run("cmake", "-S", EXAMPLES, "-B", build, "-G", "Ninja", f"-Dglobe_DIR={cmake_dir}")
    run("cmake", "--build", build)
    return build / "compose_expert"


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("factored")
    source = make_tiny("olmoe", directory / "source")
    globe.compress(source, directory / "out", globe.Settings(outer_loops=1))
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
def example(request, tmp_path_factory):
    return build_example(installed(request.param), tmp_path_factory.mktemp("example"))


@pytest.mark.parametrize("family", ["gate", "up"])
def test_example_composes_the_bits_of_the_kernel(example, factored, family, tmp_path):
    bank = factored.bank(family)
    expected = compose(bank.codes, bank.atoms.numpy().astype(ml_dtypes.bfloat16), dtype=np.float32)
    for expert in (0, len(expected) - 1):
        shown = run(example, factored.directory / BANK_FILE, family, expert, tmp_path / "mixture")
        found = np.fromfile(tmp_path / "mixture", dtype=np.float32).reshape(expected[expert].shape)
        assert np.array_equal(found.view(np.uint32), expected[expert].view(np.uint32))
        assert "{} x {} float32".format(*found.shape) in shown


@pytest.mark.parametrize(
    ("family", "expert", "status", "message"),
    [("down", "0", 1, "no globe.down.atoms"), ("gate", "16", 1, "expected 0 to 15"), ("gate", "first", 2, "usage")],
)
def test_example_refuses(example, factored, family, expert, status, message, tmp_path):
    command = [example, factored.directory / BANK_FILE, family, expert, tmp_path / "mixture"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr
    assert not (tmp_path / "mixture").exists()


def test_the_installed_files_can_be_moved(tmp_path):
    package = installed("wheel").parents[2]
    for part in ("include", "lib"):
        shutil.copytree(package / part, tmp_path / "moved" / part)
    for file in (tmp_path / "moved" / "lib" / "cmake").rglob("*.cmake"):
        assert str(package) not in file.read_text(encoding="utf-8")
    assert build_example(tmp_path / "moved" / "lib" / "cmake" / "globe", tmp_path / "build").exists()


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
