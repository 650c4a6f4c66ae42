"""A minute of libFuzzer for each target of cpp/fuzz, from the corpus in the tree."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ("codes", "directory", "header", "json")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if shutil.which("clang++") is None or shutil.which("cmake") is None:
        pytest.skip("clang++ or cmake is not installed")
    directory = tmp_path_factory.mktemp("fuzz")
    built = [f"fuzz_{target}" for target in TARGETS]
    for command in (
        ["cmake", "-S", ROOT, "--preset", "fuzz", "-B", directory],
        ["cmake", "--build", directory, "--target", *built],
    ):
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_minute(target, build, tmp_path):
    corpus = ROOT / "cpp" / "fuzz" / "corpus" / target
    assert list(corpus.iterdir())
    limits = ("-max_total_time=60", "-rss_limit_mb=2048", "-timeout=20", f"-artifact_prefix={tmp_path}/")
    (tmp_path / "found").mkdir()
    command = [build / f"fuzz_{target}", *limits, tmp_path / "found", corpus]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr or "Done" in done.stderr
