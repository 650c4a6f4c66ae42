"""The documentation's reader of the format, its examples, and its pages."""

import doctest
import importlib
import re
import runpy
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import globe
from checkpoints import FUSED_ON_DISK, make_tiny
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.tensorfile import read_tensor

DOCS = Path(__file__).parent.parent / "docs"
MODULES = [
    "sizes.ratios",
    "settings.keys",
    "kernels.compose",
    "kernels.compose_matmul",
    "kernels.entmax",
    "kernels.gram",
    "kernels.nnls",
    "kernels.qmatmul",
]


def dense_part(tensor, family, expert):
    """Return an expert's matrix from a tensor of the dense checkpoint; gate is above up in a fused one."""
    if tensor.ndim == 2:
        return tensor
    matrix, half = tensor[expert], tensor.shape[1] // 2
    return matrix if family == "down" else matrix[:half] if family == "gate" else matrix[half:]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("layout", "scope", "bits"),
    [
        ("olmoe", "global", {}),
        (next(iter(FUSED_ON_DISK)), "layer", {}),
        ("olmoe", "global", {"left_bits": 3, "atom_bits": 8}),
        (next(iter(FUSED_ON_DISK)), "layer", {"left_bits": 4}),
    ],
    ids=str,
)
def test_the_reader_reads_what_export_writes(layout, scope, bits, tmp_path):
    reader = runpy.run_path(str(DOCS / "reader.py"))
    source, out = make_tiny(layout, tmp_path / "source", shards=2), tmp_path / "out"
    settings = globe.Settings(
        rank=32, outer_loops=1, joint_steps=2, families=("gate", "up", "down"), scope=scope, calibrate="none", **bits
    )
    globe.compress(source, out, settings)
    globe.export(out, tmp_path / "dense")
    dense = Checkpoint(tmp_path / "dense")
    for family in settings.families:
        experts = dense.family(family).experts
        for expert in (experts[0], experts[-1]):
            stored = read_tensor(expert.info).float().numpy()
            number = 0 if expert.index is None else expert.index
            expected = dense_part(stored, family, number)
            found = reader["read_expert"](out, family, expert.tensor, number)
            assert found.dtype == np.float32 and found.shape == expected.shape
            rounded = found.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_allclose(rounded, expected, rtol=2**-7, atol=1e-6)


def test_the_reader_is_short_and_needs_numpy_and_safetensors_alone():
    text = (DOCS / "reader.py").read_text(encoding="utf-8")
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) <= 32
    names = {line.split()[1].split(".")[0] for line in code if line.startswith(("import ", "from "))}
    assert names == {"json", "numpy", "safetensors"}


@pytest.mark.smoke
@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(f"globe.{name}")
    failed, tried = doctest.testmod(sys.modules[module.__name__])
    assert failed == 0
    assert tried > 0


def test_examples_of_pages():
    runner, tried = doctest.DocTestRunner(), 0
    for page in sorted(DOCS.rglob("*.md")):
        text = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        result = runner.run(doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0))
        assert result.failed == 0, page
        tried += result.attempted
    assert tried > 0


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="building the pages needs the extra `docs`")
    pytest.importorskip("myst_parser", reason="building the pages needs the extra `docs`")
    from sphinx.cmd.build import build_main

    assert build_main(["-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]) == 0
