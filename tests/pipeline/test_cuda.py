"""Runs on CUDA, where there is a device, against the same runs on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import make_tiny
from families import WEIGHTS_ONLY
from globe import Settings, compress
from globe.compute import devices
from globe.seeds import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_device_multiplies_as_the_cpu_does() -> None:
    devices.check_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("method", "mod"), [*((method, "exact") for method in METHODS), ("ts-pca", "aligned"), ("ts-pca", "fixed")]
)
def test_a_run_ends_where_the_cpu_ends(method: str, mod: str, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    small = {"rank": 0.5, "bank_size": 3, "outer_loops": 2, "mod": mod, "method": method, **WEIGHTS_ONLY}
    there, here = (
        compress(source, tmp_path / device, Settings(device=device, **small)).metrics["families"]  # type: ignore[arg-type]
        for device in ("cuda", "cpu")
    )
    for name, family in here.items():
        assert there[name]["relative_error"] == pytest.approx(family["relative_error"], rel=0.02)
