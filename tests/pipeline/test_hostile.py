"""Checkpoints and settings that cannot be compressed: one line, the right exit status, and no output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from globe.choice.inspect import inspect  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from refusals import SMALL, edit_json, edit_tensor, file_of, in_process, json_variants, refusal  # noqa: E402

GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
UP = "model.layers.0.mlp.experts.2.up_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture
def source(olmoe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(olmoe, tmp_path / "source"))


def poison(tensor: str, value: float) -> Callable[[Path], object]:
    def change(weights: torch.Tensor) -> torch.Tensor:
        weights[3, 7] = value
        return weights

    return lambda directory: edit_tensor(directory, tensor, change)


def reshape(tensor: str, rows: int) -> Callable[[Path], object]:
    return lambda directory: edit_tensor(directory, tensor, lambda weights: weights[:rows])


def truncate(file: str, cut: int) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:cut])


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_text(content, encoding="utf-8")


def config(**changes: object) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / "config.json", lambda value: value.update(changes))


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / INDEX, lambda value: change(value["weight_map"]))


def remove(file: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).unlink()


def empty_experts(directory: Path) -> None:
    """Give every gate and up matrix no rows, where config.json does not say how many there are."""
    edit_json(directory / "config.json", lambda value: value.pop("intermediate_size"))
    for file in SHARDS:
        tensors = load_file(directory / file)
        for name in tensors:
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name][:0]
        save_file(tensors, directory / file)


def same_tensor_twice(directory: Path) -> None:
    name, tensor = next(iter(load_file(directory / SHARDS[0]).items()))
    save_file({**load_file(directory / SHARDS[1]), name: tensor}, directory / SHARDS[1])


def drop_expert(directory: Path) -> None:
    file = file_of(directory, GATE)
    tensors = load_file(file)
    del tensors[GATE]
    save_file(tensors, file)
    edit_json(directory / INDEX, lambda value: value["weight_map"].pop(GATE))


# Each: what is done to the checkpoint, and the words that the error must have.
DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (remove(SHARDS[1]), (SHARDS[1], "missing")),
    "truncated shard": (truncate(SHARDS[1], -1000), (SHARDS[1], "truncated")),
    "index names absent tensor": (
        index(lambda names: names.update({"model.ghost.weight": SHARDS[0]})),
        (INDEX, "model.ghost.weight"),
    ),
    "nan": (poison(GATE, float("nan")), (GATE, "expert 5 of layer 1", "NaN or Inf", "row 3")),
    "inf": (poison(UP, float("inf")), (UP, "expert 2 of layer 0", "NaN or Inf", "row 3", "family up")),
    "minus inf": (poison(GATE, float("-inf")), (GATE, "NaN or Inf")),
    "unequal shapes": (reshape(GATE, 31), (GATE, "[31, 64]", "[32, 64]")),
    "one axis too few": (lambda directory: edit_tensor(directory, GATE, torch.flatten), (GATE, "[2048]", "2 axes")),
    "integer experts": (lambda directory: edit_tensor(directory, UP, lambda weights: weights.to(torch.int8)),
                        (UP, "I8", "BF16")),
    "no rows": (empty_experts, ("gate_proj", "[0, 64]")),
    "expert missing": (drop_expert, (GATE, "is missing", "no expert 5", "family gate of layer 1")),
    "unknown architecture": (config(model_type="gpt_neo"), ("unknown architecture", "'gpt_neo'", "olmoe")),
    "no model type": (config(model_type=None), ("unknown architecture", "None")),
    "another width": (config(intermediate_size=48), ("config.json", "48", "32")),
    "config absent": (remove("config.json"), ("config.json", "cannot be read")),
    "config not JSON": (text("config.json", "{'model_type': olmoe}"), ("config.json", "not valid JSON")),
    "config a list": (text("config.json", "[]"), ("config.json", "JSON object", "list")),
    "config nested deep": (text("config.json", "[" * 100_000), ("config.json", "not valid JSON")),
    "config not text": (lambda directory: (directory / "config.json").write_bytes(b"\xff\xfe\x00"),
                        ("config.json", "not valid JSON")),
    "layers in words": (config(num_hidden_layers="two"), ("num_hidden_layers", "'two'")),
    "index not JSON": (truncate(INDEX, 100), (INDEX, "not valid JSON")),
    "index empty": (text(INDEX, "{}"), (INDEX, "weight_map")),
    "index maps to numbers": (index(lambda names: names.update({GATE: 7})), (INDEX, "7")),
    "index maps to lists": (index(lambda names: names.update({GATE: ["a"]})), (INDEX, "'a'")),
    "index leads outside": (index(lambda names: names.update({GATE: "../shard"})), (INDEX, "../shard", "outside")),
    "index names another shard": (index(lambda names: names.update({GATE: SHARDS[0], UP: SHARDS[1]})), (INDEX,)),
    "no weights": (lambda directory: [remove(file)(directory) for file in (*SHARDS, INDEX)],
                   ("model.safetensors", INDEX)),
    "shard empty": (truncate(SHARDS[0], 0), (SHARDS[0], "header")),
    "shard is a directory": (
        lambda directory: (remove(SHARDS[0])(directory), (directory / SHARDS[0]).mkdir()),
        (SHARDS[0], "cannot be read"),
    ),
    "header length beyond the file": (
        lambda directory: (directory / SHARDS[0]).write_bytes(b"\xff" * 4 + b"\0" * 100),
        (SHARDS[0], "header"),
    ),
}  # fmt: skip
PROCESSES = {"missing shard", "nan"}  # refused before the pass over the weights, and in it


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoint(case: str, source: Path, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    damage(source)
    line = refusal(1, "compress", source, tmp_path / "out", *SMALL, process=case in PROCESSES)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_the_undamaged_checkpoint_is_compressed(source: Path, tmp_path: Path) -> None:
    done = in_process("compress", source, tmp_path / "out", *SMALL, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_every_family_is_scanned_before_the_first_is_trained(source: Path, tmp_path: Path) -> None:
    poison(UP, float("nan"))(source)
    done = in_process("compress", source, tmp_path / "out", *SMALL)
    assert done.returncode == 1 and UP in done.stderr.splitlines()[-1]
    assert "up: scan" in done.stderr and "gate: seeds" not in done.stderr
    assert "Traceback" not in done.stderr


def test_nan_in_a_fused_tensor_names_the_expert(tmp_path: Path) -> None:
    source = make_tiny("qwen3_5_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and name.endswith("gate_up_proj"))
    half = tensors[name].shape[1] // 2
    tensors[name][2, half + 1, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refusal(1, "compress", source, tmp_path / "out", *SMALL)
    assert f"tensor {name} (expert 2 of layer 1)" in line and "row 1 of family up" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "0"), ("rank is 0",)),
        (("--rank", "0.0"), ("rank is 0.0",)),
        (("--rank", "0.001"), ("0 rows", "min(p, d) = 32")),
        (("--rank", "-4"), ("rank is -4",)),
        (("--rank", "33"), ("33", "min(p, d) = 32")),
        (("--rank", "1.5"), ("rank is 1.5",)),
        (("--rank", "nan"), ("rank is nan",)),
        (("--rank", "inf"), ("rank is inf",)),
        (("--rank", "9" * 400), ("rank", "min(p, d) = 32")),
        (("--rank", "half"), ("--rank", "'half'")),
        (("--bank-size", "0"), ("bank_size is 0",)),
        (("--bank-size", "-1"), ("bank_size is -1",)),
        (("--bank-size", "17"), ("17", "16 experts")),
        (("--bank-ratio", "1.01"), ("bank_ratio is 1.01",)),
        (("--bank-ratio", "nan"), ("bank_ratio is nan",)),
        (("--bank-ratio", "0.5", "--bank-size", "3"), ("bank_ratio and bank_size",)),
        (("--families", "router"), ("families is 'router'",)),
        (("--families", "gate,gate"), ("families", "once")),
        (("--families", ""), ("families is ''",)),
        (("--rank", "1.0", "--bank-size", "16"), ("saves nothing", "--rank", "--bank-size")),
        (("--outer-loops", "-1"), ("outer_loops is -1",)),
        (("--support", "0"), ("support is 0",)),
        (("--threads", "0"), ("threads is 0",)),
        (("--seed", "-1"), ("seed is -1",)),
        (("--device", "tpu"), ("--device", "'tpu'")),
        (("--codes", "softmax"), ("--codes", "'softmax'")),
        (("--no-such-option",), ("--no-such-option",)),
        (("--config", "/nonexistent.yaml"), ("/nonexistent.yaml", "No such file")),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) and value[0].startswith("--") else "",
)  # fmt: skip
def test_settings_that_do_not_fit(
    options: tuple[str, ...], words: tuple[str, ...], olmoe: Path, tmp_path: Path
) -> None:
    process = options in {("--rank", "0"), ("--rank", "33")}
    line = refusal(2, "compress", olmoe, tmp_path / "out", *options, process=process)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rank: [0.5", ("cannot be read as YAML",)),
        ("rank: 2024-13-45", ("cannot be read as YAML", "month")),
        ("[" * 100_000, ("cannot be read as YAML",)),
        ("\x00", ("cannot be read as YAML",)),
        ("- rank", ("keys and values", "list")),
        ("rnak: 0.5", ("'rnak'", "is not a setting")),
        ("1: 2", ("1 is not a setting",)),
        ("rank: half", ("rank is 'half'",)),
        ("rank: true", ("rank is True",)),
        ("rank: .inf", ("rank is inf",)),
        ("rank: null", ("rank is None",)),
        ("l1: .nan", ("l1 is nan",)),
        ("outer_loops: 2.5", ("outer_loops is 2.5", "integer")),
        ("outer_loops: [6]", ("outer_loops is [6]",)),
        ("codes: {entmax: 1.5}", ("codes is {'entmax': 1.5}", "sparsemax")),
        ("families: 5", ("families is 5",)),
        ("families: null", ("families is None",)),
        ("families: [gate, [up]]", ("families is ['up']",)),
        ("families: {gate: 1}", ("families is {'gate': 1}",)),
        ("l1: 0.1", ("l1 is 0.1", "codes entmax", "nnls")),
        ("l1: 0.1\ncodes: simplex", ("l1 is 0.1", "codes simplex")),
        ("entmax_alpha: 1", ("entmax_alpha is 1",)),
        ("validation_share: 0.9", ("validation_share is 0.9",)),
    ],
    ids=lambda value: value[:24].strip() if isinstance(value, str) else "",
)
def test_settings_file(content: str, words: tuple[str, ...], olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content, encoding="utf-8")
    line = refusal(2, "compress", olmoe, tmp_path / "out", "--config", file)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("model",), ("model", "out", "more")])
def test_wrong_number_of_arguments(arguments: tuple[str, ...]) -> None:
    assert "argument" in refusal(2, "compress", *arguments).lower()


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_one_wrong_value_in_a_json_file(file: str, source: Path) -> None:
    """Whatever single value is replaced, the checkpoint is described or refused, never met with another error."""
    path = source / file
    refused = 0
    for what, variant in json_variants(json.loads(path.read_text()), (None, True, -1, 10**400, 0.5, "x", [], {}, [[]])):
        path.write_text(json.dumps(variant), encoding="utf-8")
        try:
            inspect(source)
        except GlobeError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
    assert refused > 20
