"""Nothing of a checkpoint is left out without a word: both forms of experts, missing ones, foreign names, the rest."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import deserialize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import load  # noqa: E402
from globe.artifact.export import export  # noqa: E402
from globe.checkpoint.completeness import stated_layers  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from globe.choice.inspect import inspect  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.settings import Settings  # noqa: E402
from refusals import SMALL, edit_json, refusal  # noqa: E402
from trips import ALL, check_round_trip, load_plain, read_directory, run_cli, travel  # noqa: E402

EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
INDEX = "model.safetensors.index.json"
SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", **WEIGHTS_ONLY)
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0 and 2 have experts, layer 1 is dense."""
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("qwen") / "source")


@pytest.fixture
def source(qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "source"))


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def renamed(old: str, new: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def fuse(layer: int, prefix: str = "model.layers.{}.mlp.experts.") -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        count = 1 + max(e for e in range(100) if EXPERT.format(layer, e, "gate") in tensors)
        stacks = {f: torch.stack([tensors.pop(EXPERT.format(layer, e, f)) for e in range(count)]) for f in FAMILIES}
        tensors[prefix.format(layer) + "gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], 1)
        tensors[prefix.format(layer) + "down_proj"] = stacks["down"]

    return change


def test_layers_in_both_forms(source: Path, tmp_path: Path) -> None:
    plain = load_plain(source)
    ids = torch.arange(40)[None]
    wanted = plain(ids).logits
    families = {name: Checkpoint(source).family(name) for name in FAMILIES}
    before = {name: [family.read(i).clone() for i in range(len(family))] for name, family in families.items()}
    edit(source, fuse(2))
    assert (load_plain(source)(ids).logits - wanted).abs().max() < 1e-5  # transformers reads both
    found = inspect(source)
    for name in FAMILIES:
        family = Checkpoint(source).family(name)
        assert (found["families"][name]["experts"], found["families"][name]["layers"]) == (16, 2)
        assert all(torch.equal(family.read(i), weights) for i, weights in enumerate(before[name]))
    trip = travel(tmp_path, source, *SMALL, *ALL)
    check_round_trip(trip)
    assert trip.metrics["families"]["gate"]["rank"] == 16
    logits = load(trip.out, dtype=torch.float32)(ids).logits  # the factors, not rounded to bf16
    dense = load_plain(trip.dense)(ids).logits
    assert (logits - dense).abs().max() < 0.05 * dense.abs().max()


def test_one_family_of_layers_in_both_forms(source: Path, tmp_path: Path) -> None:
    """The half of a fused tensor that is not compressed comes back bit for bit."""
    edit(source, fuse(0))
    trip = travel(tmp_path, source, *SMALL, "--families", "gate")
    check_round_trip(trip)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before, after = (read_directory(place)[name].values() for place in (trip.source, trip.dense))
    assert (before[:, 32:] == after[:, 32:]).all() and (before[:, :32] != after[:, :32]).any()


def test_calibration_is_the_same_in_both_forms(source: Path, tmp_path: Path) -> None:
    plain = calibrate_tiny(source, tmp_path / "plain.safetensors").layer(2)
    edit(source, fuse(2))
    assert torch.equal(calibrate_tiny(source, tmp_path / "fused.safetensors").layer(2).gate_rows, plain.gate_rows)


def gaps(tensors: Tensors) -> None:
    for layer in (0, 2):
        for family in FAMILIES:
            for expert in (1, 3, 5, 7):
                tensors.pop(EXPERT.format(layer, expert, family))


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def both(tensors: Tensors) -> None:
    copies = {name: value for name, value in tensors.items() if ".layers.0.mlp.experts." in name}
    fuse(0)(tensors)
    tensors.update(copies)


def quantised(ends: tuple[str, ...]) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors.pop(name)
            tensors.update({name.replace(".weight", end): torch.zeros(4, 8, dtype=torch.int32) for end in ends})

    return change


def mlx(tensors: Tensors) -> None:
    for layer in (0, 2):
        fuse(layer, "model.layers.{}.mlp.switch_mlp.")(tensors)


BROKEN: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "numbers with gaps": (gaps, ("layer 0 has experts 0, 2, 4, 6;", "expected 0 to 3", "router")),
    "one gate missing": (drop(EXPERT.format(2, 3, "gate")), (EXPERT.format(2, 3, "gate"), "is missing")),
    "one up missing": (drop(EXPERT.format(0, 7, "up")), (EXPERT.format(0, 7, "up"), "is missing", "family gate")),
    "one down missing": (drop(EXPERT.format(0, 0, "down")), (EXPERT.format(0, 0, "down"), "is missing")),
    "an expert missing": (
        drop(*(EXPERT.format(2, 7, family) for family in FAMILIES)),
        (EXPERT.format(2, 7, "gate"), "is missing", "layer 0 has"),
    ),
    "all downs missing": (
        drop(*(EXPERT.format(layer, e, "down") for layer in (0, 2) for e in range(8))),
        ("no routed experts of family down",),
    ),
    "a layer missing": (
        drop(*(EXPERT.format(2, e, family) for family in FAMILIES for e in range(8))),
        ("layer 2 has no routed experts", "mlp_only_layers [1]", "fetch"),
    ),
    "a layer under other names": (
        renamed("layers.2.mlp.experts", "layers.2.moe.experts"),
        ("layer 2 has no routed experts", "model.layers.2.moe.experts."),
    ),
    "in both forms at once": (both, ("expert 0 of layer 0 is in", "mlp.experts.down_proj;", "expected one")),
    "inside another": (
        renamed("model.layers", "student.model.layers"),
        ("has 'student.model.' where 'model.' is expected", "AutoModelForCausalLM"),
    ),
    "GPTQ": (quantised((".qweight", ".qzeros", ".scales")), ("quantised as by GPTQ or AWQ", "qweight", "start from")),
    "compressed-tensors": (
        quantised((".weight_packed", ".weight_scale", ".weight_shape")),
        ("weight is stored as I32", "no quantization_config that says how", "start from"),
    ),
    "MLX": (mlx, ("as MLX stores them", "switch_mlp", "start from")),
    "other names": (
        renamed(".experts.", ".specialists."),
        ("named as routed experts", "model.layers.{layer}", "found"),
    ),
}


@pytest.mark.parametrize("prefix", ["layers", "model.language_model.layers", "language_model.model.layers"])
def test_names_of_layers_below_other_modules_are_read(prefix: str, source: Path) -> None:
    def read() -> list[tuple[str, torch.Tensor]]:
        families = [Checkpoint(source).family(name) for name in FAMILIES]
        return [(each.tensor, family.read(n)) for family in families for n, each in enumerate(family.experts)]

    before = read()
    edit(source, renamed("model.layers", prefix))
    for (old, wanted), (new, found) in zip(before, read(), strict=True):
        assert new == old.replace("model.layers", prefix) and torch.equal(found, wanted)


@pytest.mark.parametrize("case", BROKEN)
def test_refused_when_it_is_opened(case: str, source: Path, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    edit(source, change)
    line = refusal(1, "inspect", source)
    for word in words:
        assert word in line, line
    assert "supported are" not in line
    options = (*SMALL, "--families", "gate")
    assert refusal(1, "compress", source, tmp_path / "out", *options) == line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, {0, 1, 2, 3}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 1}, {0, 2, 3}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, {1, 3}),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1}, {1, 2, 3}),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, {2}),
        ({"moe_layer_freq": [0, 1, 1, 0]}, {1, 2}),
        ({"moe_layers": [0, 3]}, {0, 3}),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"], "first_k_dense_replace": 3}, {1, 2}),
        ({"n_routed_experts": 8}, None),  # transformers has a default of its own
    ],
)
def test_layers_that_config_states(config: dict[str, Any], layers: set[int] | None) -> None:
    assert stated_layers(config, 4) == layers
    assert stated_layers(config, None) is None


def test_experts_where_config_says_there_are_none(tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    edit_json(source / "config.json", lambda value: value.update(mlp_only_layers=[1, 2]))
    told = "config.json says that layer 2 has no routed experts, but the weight files have some there"
    for command in (("inspect", source), ("compress", source, tmp_path / "out", "--calibrate", "none")):
        assert f"{told}, and layer 2 lacks the dense ones" in refusal(1, *command)
    tensors = load_file(source / "model.safetensors")
    for name in ("gate", "up", "down"):
        tensors[f"model.layers.2.mlp.{name}_proj.weight"] = tensors[f"model.layers.1.mlp.{name}_proj.weight"] * 2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert run_cli("inspect", source)["notes"] == [f"{told}: transformers drops them"]


def test_what_is_left_behind_is_named_and_the_rest_goes_along(source: Path, tmp_path: Path) -> None:
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}", encoding="utf-8")
    (source / "original").mkdir()
    (source / "original" / "weights.pth").write_bytes(b"0")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.json").write_text("{}", encoding="utf-8")
    (source / "merges.txt").symlink_to("nowhere")
    (source / "model.gguf").write_bytes(b"GGUF")
    save_file({"x": torch.ones(2)}, source / "extra.safetensors")
    told = "left behind: extra.safetensors, merges.txt (a link to nothing), model.gguf, original/ (weights)"
    notes = run_cli("inspect", source)["notes"]
    assert notes == [told]
    lines = Lines()
    out = compress(source, tmp_path / "out", SETTINGS, progress=lines).directory
    assert lines.lines[:1] == notes
    export(out, tmp_path / "dense")
    for place in (out, tmp_path / "dense"):
        assert (place / "additional_chat_templates" / "tool.jinja").read_text(encoding="utf-8") == "{{ messages }}"
        assert not [name for name in ("merges.txt", "original", ".cache", "model.gguf") if (place / name).exists()]
    manifest = json.loads((out / "globe.json").read_text(encoding="utf-8"))
    assert {"additional_chat_templates/tool.jinja", "tokenizer.json"} <= set(manifest["companions"])


def test_a_plain_checkpoint_has_no_notes(qwen: Path) -> None:
    assert inspect(qwen)["notes"] == []


def test_a_model_beside_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source", shards=2)
    save_file({"x": torch.ones(2)}, source / "model.safetensors")
    assert "model.safetensors is not named by" in refusal(1, "inspect", source)


def test_of_a_tensor_in_two_shards_the_copy_that_the_index_names(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source", shards=2)
    wanted = {name: tensor.raw for name, tensor in read_directory(source).items()}
    kept = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    shards = [load_file(source / f"model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    doubled = [next(name for name in shard if ".experts." in name) for shard in shards]
    doubled += [next(name for name in shard if ".experts." not in name) for shard in shards]
    for number, shard in enumerate(shards):
        wrong = {name: torch.full_like((shards[1 - number] | shard)[name], 7) for name in doubled if name not in shard}
        file = source / f"model-0000{number + 1}-of-00002.safetensors"
        save_file({**shard, **wrong}, file, metadata={"format": "pt"})
    notes = inspect(source)["notes"]
    assert len(notes) == 2 and all("left out, for model.safetensors.index.json names" in note for note in notes)
    checkpoint = Checkpoint(source)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == kept
    out = compress(source, tmp_path / "out", SETTINGS).directory
    export(out, tmp_path / "dense")
    after = read_directory(tmp_path / "dense")
    assert {name: tensor.file for name, tensor in after.items()} == kept
    assert sorted(name for name, tensor in after.items() if tensor.raw != wanted[name]) == sorted(
        expert.tensor for family in ("gate", "up") for expert in checkpoint.family(family).experts
    )
    assert json.loads((tmp_path / "dense" / INDEX).read_text(encoding="utf-8"))["weight_map"] == kept


RARE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "C64": 64}


def test_every_dtype_of_the_format_is_copied(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for number, (dtype, bits) in enumerate(RARE.items()):
        values = bytes((17 * number + i) % 256 for i in range(bits))
        header[f"model.rare.{dtype}"] = {
            "dtype": dtype,
            "shape": [2, 4],
            "data_offsets": [len(data), len(data) + len(values)],
        }
        data += values
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    assert len(deserialize(file.read_bytes())) == len(header) - 1  # the package reads it so
    trip = travel(tmp_path, source, *SMALL)
    before, between, after = (read_directory(place) for place in (trip.source, trip.out, trip.dense))
    for dtype in RARE:
        name = f"model.rare.{dtype}"
        assert between[name].raw == after[name].raw == before[name].raw and after[name].dtype == before[name].dtype
    assert trip.exported["bytes"] == sum(len(tensor.raw) for tensor in before.values())


def _empty(directory: Path, *names: str) -> None:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("{}", encoding="utf-8")


def test_what_is_no_checkpoint_and_what_would_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = refusal(1, "inspect", "Qwen/Qwen3-30B-A3B")
    assert "it could not be fetched from the hub" in line
    assert "hf download" not in refusal(1, "inspect", tmp_path / "none")
    _empty(tmp_path / "bins", "config.json", "pytorch_model.bin")
    line = refusal(1, "inspect", tmp_path / "bins")
    assert "pytorch_model.bin, not in safetensors" in line and "save_pretrained" in line and "bins-safetensors" in line
    _empty(tmp_path / "lora", "adapter_config.json", "adapter_model.safetensors")
    line = refusal(1, "compress", tmp_path / "lora", tmp_path / "out", *SMALL)
    assert "an adapter, not a model" in line and "merge_and_unload()" in line
    _empty(tmp_path / "gguf", "model.gguf")
    assert "GGUF" in refusal(1, "inspect", tmp_path / "gguf")
    assert "GGUF" in refusal(1, "inspect", tmp_path / "gguf" / "model.gguf")
    _empty(tmp_path / "shards", "config.json", "model-00001-of-00002.safetensors")
    assert f"no {INDEX}" in refusal(1, "inspect", tmp_path / "shards")
    (tmp_path / "link").symlink_to("nowhere")
    assert "a link to nothing" in refusal(1, "inspect", tmp_path / "link")


def test_the_command_for_a_folder_of_bin_files_helps(qwen: Path, tmp_path: Path) -> None:
    bins = Path(shutil.copytree(qwen, tmp_path / "bins"))
    torch.save(load_file(bins / "model.safetensors"), bins / "pytorch_model.bin")
    (bins / "model.safetensors").unlink()
    command = refusal(1, "inspect", bins).split("`")[1]
    code = command.removeprefix('python -c "').removesuffix('"')
    exec(code, {})
    assert inspect(tmp_path / "bins-safetensors")["families"] == inspect(qwen)["families"]
