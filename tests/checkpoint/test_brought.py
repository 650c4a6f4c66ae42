"""What users bring: files of other writers, links, names of any kind, experts of zeros, sources used twice at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from architectures import tiny_model  # noqa: E402
from checkpoints import LAYOUTS, byte_tokenizer, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import read_layouts  # noqa: E402
from globe.checkpoint.quantised import quantization_of, with_quantization  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import edit_json, refusal  # noqa: E402
from trips import load_plain  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY)
TOKENS = torch.arange(24)[None] * 7 % 256


def logits(directory: Path) -> torch.Tensor:
    model, _ = load_model(directory)
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


@pytest.mark.parametrize("layout", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe", "granitemoe"])
def test_stacks_that_transformers_writes_of_experts_known_one_by_one(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (LAYOUTS[layout]() if layout in LAYOUTS else tiny_model(layout)).bfloat16()
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    byte_tokenizer().save_pretrained(tmp_path / "source")
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "source/model.safetensors"))
    compress(tmp_path / "source", tmp_path / "out", SETTINGS)
    export(tmp_path / "out", tmp_path / "dense")
    wanted = logits(tmp_path / "dense")
    assert (logits(tmp_path / "out") - wanted).abs().max() < 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("families", [("gate", "up"), ("down",)])
def test_experts_one_by_one_of_a_type_that_is_published_in_stacks(families: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    LAYOUTS["qwen3_5_moe"]().bfloat16().save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    names = load_file(tmp_path / "source" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names and not any("experts.gate_up" in n for n in names)
    compress(tmp_path / "source", tmp_path / "out", replace(SETTINGS, families=families))
    export(tmp_path / "out", tmp_path / "dense")
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == names
    wanted = logits(tmp_path / "dense")
    assert (logits(tmp_path / "out") - wanted).abs().max() < 2e-2 * wanted.abs().max()


def test_experts_one_by_one_of_a_type_that_transformers_reads_in_stacks_alone(tmp_path: Path) -> None:
    source = make_tiny("granitemoe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("input_linear.weight")]:
        place = name.removesuffix("input_linear.weight") + "experts"
        for expert, both in enumerate(tensors.pop(name)):
            tensors |= {f"{place}.{expert}.{half}_proj.weight": both[::2].clone() for half in ("gate", "up")}
    for name in [name for name in tensors if name.endswith("output_linear.weight")]:
        place = name.removesuffix("output_linear.weight") + "experts"
        tensors |= {f"{place}.{n}.down_proj.weight": down.clone() for n, down in enumerate(tensors.pop(name))}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="missing_keys"):
        load_plain(source)
    line = refusal(1, "inspect", source)
    assert "block_sparse_moe.experts.0." in line and "in stacks alone" in line and "input_linear.weight" in line


def test_links_and_names_of_any_kind(tmp_path: Path) -> None:
    """As huggingface_hub keeps a snapshot: every file a link to a blob."""
    blobs = make_tiny("qwen3_moe", tmp_path / "blobs", shards=2)
    source = tmp_path / "ein Modell, größer – 模型"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(Path("..") / "blobs" / file.name)
    compress(source, tmp_path / "aus gabe é", SETTINGS)
    export(tmp_path / "aus gabe é", tmp_path / "dicht ß")
    assert not any(file.is_symlink() for file in (tmp_path / "aus gabe é").iterdir())
    assert (
        Checkpoint(tmp_path / "dicht ß").family("gate").read(0).shape == Checkpoint(source).family("gate").read(0).shape
    )


def test_two_runs_of_one_source_at_once(tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: compress(source, tmp_path / name, SETTINGS), ("one", "two")))
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")
    )
    assert one == two


def test_an_expert_of_zeros_stays_one(tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.1.gate_proj.weight"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "out", SETTINGS)
    export(tmp_path / "out", tmp_path / "dense")
    assert not load_file(tmp_path / "dense" / "model.safetensors")[name].any()


@pytest.mark.parametrize("key", ["_name_or_path", "base_model_name_or_path", "base_model"])
@pytest.mark.parametrize("form", ["GPTQ", "bitsandbytes"])
def test_what_is_not_decoded_names_the_model_that_it_was_made_of(key: str, form: str, tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        codes = torch.zeros(4, 4, dtype=torch.int32 if form == "GPTQ" else torch.uint8)
        tensors[name.replace("weight", "qweight") if form == "GPTQ" else name] = codes
        if form == "GPTQ":
            del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": form.lower()}
    edit_json(
        source / "config.json", lambda value: value.update({key: "org/whole", "quantization_config": quantization})
    )
    with pytest.raises(GlobeError) as caught:
        Checkpoint(source).family("gate")
    line = str(caught.value)
    assert "start from" in line and line.endswith(", org/whole") and "\n" not in line


def test_a_quantization_config_of_the_language_model(tmp_path: Path) -> None:
    stated = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = {"model_type": "a", "text_config": {"hidden_size": 64, "quantization_config": stated}}
    assert quantization_of(config) == stated
    assert with_quantization(config, None) == {"model_type": "a", "text_config": {"hidden_size": 64}}
    assert with_quantization(config, {"x": 1})["text_config"] == {"hidden_size": 64, "quantization_config": {"x": 1}}
    assert quantization_of({"quantization_config": stated, "text_config": {}}) == stated
    assert with_quantization({"a": 1}, None) == {"a": 1} and quantization_of({"a": 1}) is None


def test_every_layout_has_families_that_end_in_down() -> None:
    for layout in read_layouts():
        assert layout.families in (("gate", "up", "down"), ("up", "down")), layout.name


def _odd_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"] = torch.zeros(32, 60)


def _one_axis(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"] = torch.zeros(32)


WRONG: dict[str, tuple[str, ...]] = {
    "a shape": ("experts.1.up_proj.weight has shape [32, 60]", "[32, 64]", "fetch the checkpoint again"),
    "an axis": ("experts.1.up_proj.weight has shape [32]", "expected 2 axes", "fetch the checkpoint again"),
    "a count": ("states 7 as experts per layer", "have 8", "fetch both again, or mend config.json"),
    "layers": ("num_hidden_layers is '3'", "expected an integer", "fetch it again"),
    "an index": ("names tensor model.none in model-00001-of-00002.safetensors", "does not hold it", "fetch both again"),
    "a file name": ("is mapped to 3", "expected a file name", "fetch it again"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_with_what_was_expected_and_the_remedy(what: str, tmp_path: Path) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "source", shards=2 if what in ("an index", "a file name") else 1)
    if what in ("a shape", "an axis"):
        tensors = load_file(source / "model.safetensors")
        (_odd_shape if what == "a shape" else _one_axis)(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    elif what in ("a count", "layers"):
        changes = {"num_experts": 7, "num_local_experts": 7} if what == "a count" else {"num_hidden_layers": "3"}
        edit_json(source / "config.json", lambda config: config.update(changes))
    else:
        place = "model-00001-of-00002.safetensors" if what == "an index" else 3
        edit_json(
            source / "model.safetensors.index.json", lambda index: index["weight_map"].update({"model.none": place})
        )
    line = refusal(1, "inspect", source)
    assert all(part in line for part in WRONG[what]), line
