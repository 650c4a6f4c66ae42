"""What an installed package is checked with, away from its sources: `pytest -m smoke`, in seconds."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

import globe
from checkpoints import make_tiny
from globe import kernels

pytestmark = pytest.mark.smoke
BACKENDS = ("native", "numba")


def run(*command):
    done = subprocess.run([sys.executable, "-m", "globe", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny("olmoe", tmp_path_factory.mktemp("smoke") / "source")


@pytest.fixture(scope="module")
def factored(source):
    """Write with the command, from a file of settings, in the metric of a text that passes through the model."""
    root = source.parent
    (root / "settings.yaml").write_text("{rank: 0.5, outer_loops: 1, joint_steps: 2, calibration_tokens: 1024}\n")
    options = ("--calibrate", "pydoc", "--config", root / "settings.yaml", "--json", "--quiet")
    found = json.loads(run("compress", source, root / "out", *options))
    assert set(found["families"]) == {"gate", "up"}
    return root / "out"


def test_the_distribution_is_this_version_with_its_command():
    assert metadata.version("globe-moe") == globe.__version__
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "globe")
    assert script.value == "globe.cli:main"


def test_the_package_holds_its_data_types_and_the_library():
    package = Path(globe.__file__).parent
    assert (package / "py.typed").is_file() and (package / "checkpoint" / "layouts.json").is_file()
    assert (Path(globe.get_cmake_dir()) / "globeConfig.cmake").is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_agree_with_their_reference(backend):
    rng = np.random.default_rng(0)
    atoms, targets = (rng.standard_normal((n, 50)).astype(np.float32) for n in (6, 4))
    gram, logits = kernels.gram(atoms, backend="reference"), rng.standard_normal((3, 9))
    np.testing.assert_allclose(kernels.gram(atoms, backend=backend), gram, rtol=1e-5, atol=1e-5)
    ours, theirs = (kernels.nnls(gram, targets @ atoms.T, backend=name).codes for name in (backend, "reference"))
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    ours, theirs = (kernels.entmax(logits, backend=name) for name in (backend, "reference"))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    codes = scipy.sparse.random(5, 6, density=0.5, format="csr", random_state=0)
    ours, theirs = (kernels.compose(codes, atoms, backend=name) for name in (backend, "reference"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_inspect_shows_a_table(source):
    assert "olmoe" in run("inspect", source).lower()


def test_a_factored_directory_speaks_like_its_export(source, factored, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    globe.export(factored, tmp_path / "dense")
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        ours = globe.load(factored, dtype="float32", cache="1MiB")(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(tokens).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    judged = json.loads(run("eval", factored, "--against", source, "--max-tokens", 128, "--window", 64, "--json"))
    told = {row["text"] for row in judged["texts"]}
    assert {"pydoc:topics, held-out half", "pydoc:licence, held-out half"} <= told
    assert all(row["perplexity"] > 1 and row["kl"] >= 0 for row in judged["texts"])
