"""GGUF files: what the gguf package and transformers read in them is the dense export, within the type's rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402

import checkpoints  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.artifact.gguf_file import export_gguf  # noqa: E402
from globe.artifact.gguf_model import ARCHITECTURES  # noqa: E402
from globe.artifact.gguf_tokenizer import require_tokenizer  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import in_process, refusal  # noqa: E402

SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", calibrate="none")
WORST = {"q8_0": 1 / 254 + 2**-10, "q4_0": 1 / 8 + 2**-10}  # of a block's largest value
QWEN3 = {"head_dim": 32, "moe_intermediate_size": 32, "num_experts": 4, "norm_topk_prob": True}


def merging(model: Path) -> Path:
    """A tiny checkpoint whose tokenizer merges, and has tokens beside the vocabulary."""
    file = model / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    merges = [["Ġ", "e"], ["h", "o"], ["o", "u"], ["Ġe", "x"]]
    told["model"]["merges"] = merges
    told["model"]["vocab"] |= {"".join(pair): 256 + number for number, pair in enumerate(merges)}
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    told["added_tokens"] = [
        {"id": 260, "content": "<|end|>", "special": True, **entry},
        {"id": 261, "content": "<tool>", "special": False, **entry},
    ]
    file.write_text(json.dumps(told), encoding="utf-8")
    return model


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def factored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny factored directory, of a source whose norms and biases are not those of a new model."""
    home = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            checkpoints.LAYOUTS, "qwen3_moe", checkpoints._layout("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **QWEN3)
        )
        source = merging(checkpoints.make_tiny(request.param, home / "source", shards=2))
    generator = torch.Generator().manual_seed(2)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[name] = (tensor + 0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    compress(source, home / "out", SETTINGS)
    export(home / "out", home / "dense")
    return home / "out"


def read(file: Path) -> tuple[Any, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    return reader, {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def dense(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def unturned(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama of GGUF in transformers' order, as its own reader undoes them."""
    return weights.reshape(heads, weights.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weights.shape)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_every_tensor_is_the_dense_one_within_rounding(factored: Path, kind: str) -> None:
    file = factored.parent / f"{kind}.gguf"
    done = export_gguf(factored, file, kind, overwrite=True)
    reader, found = read(file)
    config = json.loads((factored.parent / "dense" / "config.json").read_text(encoding="utf-8"))
    name = field(reader, "general.architecture")
    assert name == ARCHITECTURES[config["model_type"]].name and done["tensors"] == len(found)
    assert done["bytes"] == file.stat().st_size and not list(file.parent.glob(".*.partial"))
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    seen = set()
    for tensor, values in dense(factored.parent / "dense").items():
        merged, place = tensor, None
        if ".experts." in tensor:
            before, after = tensor.split(".experts.")
            merged, place = f"{before}.experts.{after.partition('.')[2]}", int(after.partition(".")[0])
        wanted = known.get_name(merged, (".weight", ".bias"))
        seen.add(wanted)
        stored = found[wanted] if place is None else found[wanted][place]
        if name == "llama" and wanted.endswith(("attn_q.weight", "attn_k.weight")):
            stored = unturned(stored, config["num_attention_heads" if "attn_q" in wanted else "num_key_value_heads"])
        expected = values.float().numpy()
        kept = wanted.endswith("norm.weight") or expected.ndim == 1 or "ffn_gate_inp" in wanted
        if kept:
            np.testing.assert_array_equal(stored, expected.reshape(stored.shape))
            continue
        worst = WORST["q8_0" if "token_embd" in wanted or wanted == "output.weight" else kind]
        if expected.shape[1] % 32:
            np.testing.assert_allclose(stored, expected, rtol=2**-10, atol=1e-6)
            assert wanted in done["fp16"]
            continue
        peaks = np.abs(expected.reshape(len(expected), -1, 32)).max(2).repeat(32, 1)
        assert (np.abs(stored - expected) <= worst * peaks + 1e-9).all()
    assert seen == set(found)
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == checkpoints.VOCABULARY and field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert (tokens[259:263], kinds[259:263]) == (["Ġex", "<|end|>", "<tool>", "[PAD262]"], [1, 3, 4, 5])
    assert field(reader, "tokenizer.ggml.merges") == ["Ġ e", "h o", "o u", "Ġe x"]


def test_transformers_computes_the_same(factored: Path) -> None:
    """transformers reads GGUF by its own code: sizes, constants, order of rows, and the tokenizer."""
    home = factored.parent
    config = json.loads((home / "dense" / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in ("qwen2_moe", "qwen3_moe"):
        pytest.skip("transformers does not read this architecture from GGUF")
    export_gguf(factored, home / "model.gguf", "q8_0", overwrite=True)
    told = transformers.AutoConfig.from_pretrained(home, gguf_file="model.gguf")
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob"):
        if key in config:  # which it does not read
            setattr(told, key, config[key])
    options = {"config": told, "gguf_file": "model.gguf", "dtype": torch.float32}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(home, **options).eval()
    ours, tokenizer = load_model(home / "dense")
    text = "A router chooses 2 experts,<tool> doesn't it?\n<|end|>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert loaded.config.num_experts_per_tok == ours.config.num_experts_per_tok
    with torch.no_grad():
        wanted, found = ours(ids).logits, loaded(ids).logits
    assert float((wanted - found).norm() / wanted.norm()) < 0.02
    theirs = transformers.AutoTokenizer.from_pretrained(home, gguf_file="model.gguf")
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    source = merging(checkpoints.make_tiny("olmoe", tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    compress(source, tmp_path / "out", SETTINGS)
    export_gguf(tmp_path / "out", tmp_path / "model.gguf", "q4_0")
    _, found = read(tmp_path / "model.gguf")
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("refused")
    compress(merging(checkpoints.make_tiny("olmoe", home / "source")), home / "out", SETTINGS)
    return home / "out"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "phimoe"}, r"model type phimoe found, GGUF is written of mixtral, olmoe"),
        ({"norm_topk_prob": True}, r"norm_topk_prob True, llama\.cpp's olmoe takes False"),
        ({"clip_qkv": 8.0}, r"clip_qkv 8\.0, llama\.cpp's olmoe takes None"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads 2, llama\.cpp's olmoe takes 4"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    olmoe: Path, change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    file = olmoe / "config.json"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(json.loads(before) | change), encoding="utf-8")
        with pytest.raises(GlobeError, match=told):
            export_gguf(olmoe, tmp_path / "model.gguf", "q8_0")
    finally:
        file.write_text(before, encoding="utf-8")
    assert not list(tmp_path.iterdir())


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    source = merging(checkpoints.make_tiny("qwen3_moe", tmp_path / "source"))  # its second layer is dense
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}), encoding="utf-8")
    compress(source, tmp_path / "out", SETTINGS)
    with pytest.raises(GlobeError, match=r"tensor model\.layers\.1\.mlp\..* has no place in GGUF's qwen3moe"):
        export_gguf(tmp_path / "out", tmp_path / "model.gguf", "q8_0")


def test_targets(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'q5_1' is not known; expected one of q4_0, q8_0"):
        export_gguf(olmoe, tmp_path / "model.gguf", "q5_1")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        export_gguf(olmoe, tmp_path / "model", "q8_0")
    with pytest.raises(UsageError, match=r"there is no directory"):
        export_gguf(olmoe, tmp_path / "nowhere" / "model.gguf", "q8_0")
    (tmp_path / "model.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"exists; name another file or give --overwrite"):
        export_gguf(olmoe, tmp_path / "model.gguf", "q8_0")
    assert (tmp_path / "model.gguf").read_text(encoding="utf-8") == "mine"


def test_the_command(olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    done = in_process("export", olmoe, file, "--gguf-type", "q8_0", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] == file.stat().st_size
    told = refusal(2, "export", olmoe, tmp_path / "other.gguf", "--gguf-type", "q8_0", "--as-source")
    assert "--as-source does not go with --gguf-type" in told


def byte_level(before: Any, home: Path, merges: bool = True) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")] if merges else []))
    tokenizer.pre_tokenizer = before
    home.mkdir()
    tokenizer.save(str(home / "tokenizer.json"))
    return home


def test_rules_that_split_text(tmp_path: Path) -> None:
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + "%s"
        + (r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    )
    rules = {
        "gpt-2": whole,
        "smollm": pre_tokenizers.Sequence([digits, whole]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words % ""), "isolated"), after]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words % "{1,3}"), "isolated"), after]),
    }
    for name, rule in rules.items():
        assert require_tokenizer(byte_level(rule, tmp_path / name)) == name
    others = {
        "a": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "b": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x"), "isolated"), after]),
        "c": pre_tokenizers.Metaspace(),
    }
    for name, rule in others.items():
        with pytest.raises(GlobeError, match="is no rule of llama.cpp that is known here"):
            require_tokenizer(byte_level(rule, tmp_path / name))
    with pytest.raises(GlobeError, match="BPE without merges found"):
        require_tokenizer(byte_level(whole, tmp_path / "d", merges=False))
    with pytest.raises(GlobeError, match=r"no tokenizer\.json"):
        require_tokenizer(tmp_path)
