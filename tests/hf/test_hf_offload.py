"""Experts' matrices that stay in their files: the same bits, without the memory."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import architectures  # noqa: E402
import globe  # noqa: E402
from checkpoints import FUSED_ON_DISK, LAYOUTS, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY, write_checkpoint  # noqa: E402
from globe import Settings, compress  # noqa: E402
from globe.checkpoint.tensorfile import TensorInfo, read_header, read_tensor  # noqa: E402
from globe.errors import UsageError  # noqa: E402
from globe.hf import FactoredExperts, set_cache  # noqa: E402
from globe.hf.offload import Files, map_matrices, stored_lefts, stored_matrices  # noqa: E402

SMALL: dict[str, Any] = {"rank": 0.5, "bank_size": 3, "outer_loops": 0, "device": "cpu", **WEIGHTS_ONLY}
IDS = torch.arange(24).view(2, 12) * 7 % 256
FUSED = next(iter(FUSED_ON_DISK))
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": ("olmoe", "bfloat16", {}),
    "mixtral, all families, fp32": ("mixtral", "float32", {"families": ("gate", "up", "down")}),
    "fused": (FUSED, "bfloat16", {"families": ("up", "down")}),
    "biases, stacks across": ("gpt_oss", "bfloat16", {"rank": 4}),
    "bank by layer": ("qwen3_moe", "float32", {"scope": "layer"}),
}
STACKED = {"fused", "biases, stacks across"}  # a dense down is held
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def factored(case: str) -> Path:
        if case not in made:
            layout, dtype, settings = CASES[case]
            root = tmp_path_factory.mktemp(layout)
            source = root / "source"
            if layout in LAYOUTS:
                make_tiny(layout, source, dtype=dtype, shards=2)
            else:
                architectures.tiny_model(layout).save_pretrained(source)
            made[case] = compress(source, root / "out", Settings(**{**SMALL, **settings})).directory
        return made[case]

    return factored


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def modules(model: Any) -> list[FactoredExperts]:
    return [module for module in model.modules() if isinstance(module, FactoredExperts)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case: str, dtype: str, make: Make) -> None:
    out = make(case)
    model, mapped = globe.load(out, dtype=dtype), globe.load(out, dtype=dtype, offload="disk")
    assert torch.equal(logits(mapped), logits(model))
    with torch.inference_mode():
        assert torch.equal(mapped(IDS).logits, logits(model))
    for cache in ("all", 0):
        set_cache(mapped, cache)
        assert torch.equal(logits(mapped), logits(model))
    assert mapped.globe_stats()["bank_bytes"] == model.globe_stats()["bank_bytes"]


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_those_of_the_files(case: str, make: Make) -> None:
    out = make(case)
    families = CASES[case][2].get("families", ("gate", "up"))
    model, mapped = globe.load(out), globe.load(out, offload="disk")
    names = {name for name, _ in mapped.named_parameters()} | {name for name, _ in mapped.named_buffers()}
    assert not [name for name in names if name.endswith("_left")]
    assert case in STACKED or not [name for name in names if name.endswith("experts.down_proj")]
    for ours, theirs in zip(modules(mapped), modules(model), strict=True):
        down = set() if "down" in families or case in STACKED else {"down_proj"}
        assert set(ours.mapped) == {f"{family}_left" for family in families} | down and not theirs.mapped
        for name, lefts in ours.mapped.items():
            assert torch.equal(torch.stack(lefts).to(model.dtype), getattr(theirs, name).detach())
            assert not any(left.requires_grad for left in lefts)


def test_nothing_is_said_of_tensors_that_are_not_loaded(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    out = make("olmoe")
    transformers.utils.logging.enable_propagation()
    try:
        globe.load(out, offload="disk")
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [line for line in caplog.messages if re.search("(?i)unexpected|not used|_left", line)]


def test_files_are_mapped_once_and_not_copied(make: Make) -> None:
    model = globe.load(make("olmoe"), offload="disk")
    lefts = [left for module in modules(model) for each in module.mapped.values() for left in each]
    assert len({left.untyped_storage().data_ptr() for left in lefts}) <= 2 < len(lefts)  # of two shards
    copied = copy.deepcopy(model)
    for ours, theirs in zip(modules(copied), modules(model), strict=True):
        assert ours.mapped["gate_left"][0].data_ptr() == theirs.mapped["gate_left"][0].data_ptr()
    assert torch.equal(logits(copied), logits(model))


def test_a_tensor_that_lies_askew_is_read(make: Make) -> None:
    header = read_header(next(make("olmoe").glob("globe-00001*.safetensors")))
    info = next(info for name, info in header.tensors.items() if name.endswith("gate_left"))
    rows, rank = info.shape
    askew = TensorInfo(info.file, info.dtype, (rows - 1, rank), info.start + 1, info.nbytes - 2 * rank)
    assert torch.equal(Files().map(askew).view(torch.int16), read_tensor(askew).view(torch.int16))


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """10 after 9, not after 1, whatever the order in the file."""
    import numpy as np

    weights = np.random.default_rng(0).standard_normal((24, 6, 5))
    stored = read_header(write_checkpoint(tmp_path, gate=weights) / "model.safetensors").tensors
    named = {f"{name}.globe_gate_left": stored[name] for name in sorted(stored, reverse=True)}
    lefts = map_matrices(Files(), stored_lefts(named, 1, "gate_left"))
    assert torch.equal(torch.stack(lefts), torch.from_numpy(weights[12:]).float())
    found = map_matrices(Files(), stored_matrices(stored, 0, "mlp.experts.*.gate_proj.weight"))
    assert torch.equal(torch.stack(found), torch.from_numpy(weights[:12]).float())
    for source in ("mlp.experts.gate_proj.weight", "mlp.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"):
        assert stored_matrices(stored, 0, source) == []


MEASURE = """
import json, os, sys
import torch
import globe, transformers

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))

import globe.hf
import transformers.models.olmoe.modeling_olmoe
torch.set_num_threads(1)
for options in ({}, {"offload": "disk"}):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    before = status("RssAnon")
    model = globe.load(sys.argv[1], cache=0, **options)
    loaded = status("RssAnon"), status("RssFile")
    with torch.no_grad():
        model(torch.arange(64)[None])
    run = status("RssAnon"), status("RssFile")
    print(json.dumps({"loaded": loaded[0] - before, "run": run[0] - before, "file": run[1] - loaded[1]}), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/status")
@pytest.mark.parametrize("families", [("gate", "up"), ("gate", "up", "down")], ids=["down dense", "all factored"])
def test_memory_of_a_loaded_model(families: tuple[str, ...], tmp_path: Path) -> None:
    """Anonymous memory, which the system cannot take back: without the matrices, before and after they are used."""
    import transformers

    config = transformers.OlmoeConfig(
        vocab_size=264,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        num_experts=32,
        num_experts_per_tok=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    settings = {**SMALL, "rank": 256, "method": "ts-pca", "bank_size": 2, "families": families}
    out = compress(tmp_path / "source", tmp_path / "out", Settings(**settings)).directory
    files = [read_header(path) for path in out.glob("globe*.safetensors")]
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    left = sum(info.nbytes for name, info in tensors.items() if name.endswith(("_left", "down_proj.weight")))
    assert left == 64 * 384 * 2 * (2 * 256 + (256 if "down" in families else 512))

    done = subprocess.run([sys.executable, "-c", MEASURE, str(out)], check=True, stdout=subprocess.PIPE)
    held, mapped = map(json.loads, done.stdout.splitlines())
    for when in ("loaded", "run"):
        assert held[when] - mapped[when] > 0.7 * left, (when, held, mapped)
    assert mapped["file"] > 0.5 * left  # what was used is the system's to keep or to drop


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"offload": "cpu"}, "offload is 'cpu'; expected None or 'disk'"),
        ({"offload": "disk", "device": "cuda"}, "device is cuda; expected cpu"),
        ({"offload": "disk", "device_map": "auto"}, "offload goes without device_map"),
        ({"offload": "disk", "config": object()}, "offload goes without config"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], told: str, make: Make) -> None:
    with pytest.raises(UsageError, match=told):
        globe.load(make("olmoe"), **options)


def test_packed_left_factors_are_refused(make: Make, tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    settings = Settings(**{**SMALL, "rank": 32, "left_bits": 4})
    out = compress(source, tmp_path / "out", settings).directory
    with pytest.raises(UsageError, match=r"left factors are packed \(family gate, up\), and offload takes those"):
        globe.load(out, offload="disk")


def test_it_is_not_saved(make: Make, tmp_path: Path) -> None:
    model = globe.load(make("olmoe"), offload="disk")
    with pytest.raises(UsageError, match="nothing is saved of a model with offload"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_of_a_saved_model(make: Make, tmp_path: Path) -> None:
    """`save_pretrained` of a model that holds its factors writes a directory of other names."""
    model = globe.load(make("olmoe"))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(globe.load(tmp_path / "saved", offload="disk")), logits(model))


def test_a_dense_directory_is_refused(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    with pytest.raises(UsageError, match="not factored; use transformers to load it"):
        globe.load(source, offload="disk")
