"""Factored directories of every architecture in transformers, beside their dense exports."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

import globe  # noqa: E402
from checkpoints import LAYOUTS, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.hf import FactoredExperts, set_cache  # noqa: E402
from globe.hf.banks import Bank  # noqa: E402

SMALL: dict[str, Any] = {"rank": 0.5, "bank_size": 3, "outer_loops": 0, "device": "cpu", **WEIGHTS_ONLY}
REGISTERED = sorted(set(LAYOUTS) - {"llama4_text"})
IDS = torch.arange(24).view(2, 12) * 7 % 256


@dataclass(frozen=True)
class Pair:
    """A factored directory and its dense export."""

    out: Path
    dense: Path


Make = Callable[..., Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[Any, ...], Pair] = {}

    def make(layout: str = "olmoe", dtype: str = "float32", **others: Any) -> Pair:
        key = (layout, dtype, *others.items())
        if key not in made:
            root = tmp_path_factory.mktemp(layout)
            source = make_tiny(layout, root / "source", dtype=dtype, shards=2)
            compress(source, root / "out", Settings(**{**SMALL, **others}))
            export(root / "out", root / "dense")
            made[key] = Pair(root / "out", root / "dense")
        return made[key]

    return make


def load(directory: Path, **options: Any) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(found.values()), found
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def assert_same_tensors(model: Any, other: Any) -> None:
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("layout", REGISTERED)
def test_every_architecture(layout: str, pairs: Make, tmp_path: Path) -> None:
    pair = pairs(layout)
    model = load(pair.out)
    dense = logits(load(pair.dense))
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=5e-6)
    assert len([module for module in model.modules() if isinstance(module, Bank)]) == 2
    assert any(isinstance(module, FactoredExperts) for module in model.modules())
    assert not any(name.endswith("gate_up_proj") for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same_tensors(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("families", [("gate",), ("up",)], ids="+".join)
@pytest.mark.parametrize("layout", ["granitemoe", "mixtral", "qwen2_moe", "qwen3_5_moe"])
def test_one_family(layout: str, families: tuple[str, ...], pairs: Make, tmp_path: Path) -> None:
    pair = pairs(layout, families=families)
    model = load(pair.out)
    torch.testing.assert_close(logits(model), logits(load(pair.dense)), rtol=1e-5, atol=5e-6)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert (tmp_path / "saved" / "globe.safetensors.index.json").exists()
    assert_same_tensors(model, load(tmp_path / "saved"))


@pytest.mark.parametrize("layout", ["granitemoe", "olmoe", "qwen3_5_moe"])
@pytest.mark.parametrize(
    ("others", "banks"),
    [
        ({"families": ("down",)}, 1),
        ({"families": ("gate", "up", "down"), "scope": "layer"}, 6),
        ({"families": ("gate", "up", "down"), "share_families": True}, 1),
    ],
    ids=["down", "layer", "shared"],
)
def test_down_and_other_banks(layout: str, others: dict[str, Any], banks: int, pairs: Make, tmp_path: Path) -> None:
    pair = pairs(layout, **others)
    model = load(pair.out)
    assert len(model.globe.banks) == banks
    torch.testing.assert_close(logits(model), logits(load(pair.dense)), rtol=1e-5, atol=5e-6)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(model, load(tmp_path / "saved"))


@pytest.mark.parametrize("layout", ["mixtral", "granitemoe"])
def test_bf16_is_kept_as_stored(layout: str, pairs: Make, tmp_path: Path) -> None:
    pair = pairs(layout, dtype="bfloat16")
    model = load(pair.out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "saved")
    stored = {name: tensor for file in pair.out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    saved = load_file(tmp_path / "saved" / "globe.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
    exact = logits(load(pair.out, dtype=torch.float32))
    error = (logits(model).float() - exact).norm() / exact.norm()
    assert error < 3 * max(0.01, (logits(load(pair.dense)).float() - exact).norm() / exact.norm())


def test_generate(pairs: Make) -> None:
    pair = pairs()
    model, dense = load(pair.out), load(pair.dense)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    found = model.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(found, dense.generate(IDS, attention_mask=mask, **options))
    assert model.globe_stats()["hit_rate"] > 0.5


def test_device_maps(pairs: Make, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pair = pairs()
    model = load(pair.out)
    wanted = logits(model)
    for where in ("auto", "cpu"):
        assert torch.equal(logits(load(pair.out, device_map=where)), wanted)
    split = {"model.layers.0": "cpu", "model.layers.1": "disk", "globe": "cpu", "lm_head": "cpu"}
    split |= {f"model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    offloaded = load(pair.out, device_map=split, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].mlp.experts.gate_left.device.type == "meta"
    assert torch.equal(logits(offloaded), wanted)
    with pytest.warns(UserWarning, match="offloaded"):
        offloaded.save_pretrained(tmp_path / "saved")
    assert_same_tensors(model, load(tmp_path / "saved"))


def test_a_model_without_head(pairs: Make) -> None:
    pair = pairs("mixtral")
    with torch.no_grad():
        states = [AutoModel.from_pretrained(place)(IDS).last_hidden_state for place in (pair.out, pair.dense)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=5e-6)


def test_every_budget_gives_the_same_bits(pairs: Make) -> None:
    out = pairs().out
    everything = globe.load(out, cache="all")
    experts = [module for module in everything.modules() if isinstance(module, FactoredExperts)]
    entry = experts[0].mixture("gate", 0, experts[0].gate_left).nbytes
    held = sum(2 * module.num_experts for module in experts)
    stats = everything.globe_stats()
    assert (stats["entries"], stats["bytes"], stats["budget"]) == (held, held * entry, None)
    wanted, misses = logits(everything), everything.globe_stats()["misses"]
    assert misses == held
    for cache in (0, 5 * entry, f"{9 * entry}B", "2GiB"):
        model = globe.load(out, cache=cache)
        for _ in range(2):
            assert torch.equal(logits(model), wanted)
            assert model.globe_stats()["bytes"] <= model.globe_stats()["budget"]
        if cache == 0:
            assert model.globe_stats()["hits"] == model.globe_stats()["entries"] == 0
        if cache == "2GiB":
            assert model.globe_stats()["hits"] == model.globe_stats()["misses"] > 0
    set_cache(model, "all")
    assert model.globe_stats()["entries"] == held
    set_cache(model, 0)
    assert model.globe_stats()["entries"] == 0
    assert stats["bank_bytes"] == sum(buffer.nbytes for buffer in everything.globe.buffers())


def test_threads_share_a_model(pairs: Make) -> None:
    model = globe.load(pairs().out, cache="20kB")
    prompts = [(IDS + 13 * number) % 256 for number in range(4)]
    wanted = [logits(model, ids) for ids in prompts]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(5):
            if not torch.equal(logits(model, prompts[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.globe_stats()["bytes"] <= 20_000


def test_copies_casts_and_gradients(pairs: Make) -> None:
    model = globe.load(pairs().out)
    with torch.inference_mode():
        wanted = model(IDS).logits.clone()
    copied = copy.deepcopy(model)
    assert copied.globe_stats()["entries"] == 0
    assert torch.equal(logits(copied), wanted)
    assert copied.globe_stats()["entries"] == model.globe_stats()["entries"] > 0
    model(IDS, labels=IDS).loss.backward()  # over mixtures composed in inference mode
    assert model.model.layers[0].mlp.experts.gate_left.grad.abs().sum() > 0
    copied.to(torch.bfloat16)
    assert copied.globe_stats()["entries"] == 0
    assert copied.globe.gate.codes.values.dtype == torch.float32
    assert (logits(copied).float() - wanted).norm() / wanted.norm() < 0.05


def run_python(code: str, home: Path, *arguments: object) -> Any:
    """Run a program with an empty cache of remote code, and return what it prints as JSON."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ATTEMPT = """
import json, sys
from transformers import AutoModelForCausalLM
def attempt(directory, **options):
    try:
        return type(AutoModelForCausalLM.from_pretrained(directory, **options)).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "globe":
            raise ModuleNotFoundError("No module named 'globe'", name="globe")
sys.meta_path.insert(0, Absent())
"""


def test_without_globe_it_is_refused(pairs: Make, tmp_path: Path) -> None:
    load(pairs().out).save_pretrained(tmp_path / "saved")
    load(pairs().out).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    places = [*(pairs(layout).out for layout in REGISTERED), tmp_path / "saved", tmp_path / "shards"]
    code = "places = sys.argv[1:]\nfound = [attempt(place) for place in places]\n"
    code += "found += [attempt(place, trust_remote_code=True) for place in (places[0], places[-2])]\n"
    answers = run_python(WITHOUT + ATTEMPT + code + "print(json.dumps(found))", tmp_path, *places)
    for answer in answers[: len(places)]:
        assert answer.startswith("ValueError") and "pip install 'globe-moe[hf]', then import globe.hf first" in answer
    wanted = "ImportError: this checkpoint is factored by GloBE: pip install 'globe-moe[hf]'"
    assert answers[len(places) :] == 2 * [wanted]


def test_with_remote_code(pairs: Make, tmp_path: Path) -> None:
    places = [pairs(layout).out for layout in ("mixtral", "qwen3_5_moe")]
    code = ATTEMPT + "print(json.dumps([attempt(place, trust_remote_code=True) for place in sys.argv[1:]]))"
    assert run_python(code, tmp_path, *places) == ["MixtralForCausalLM", "Qwen3_5MoeForCausalLM"]


def test_export_gives_back_a_source_of_its_own_code(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    compress(source, tmp_path / "out", Settings(**SMALL))
    load(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == config
    assert not (tmp_path / "dense" / "modeling_globe.py").exists()


def test_where_it_does_not_save(pairs: Make, tmp_path: Path) -> None:
    model = load(pairs().out)
    with pytest.raises(UsageError, match="output of globe compress"):
        model.save_pretrained(pairs().out)
    for options in ({"variant": "bf16"}, {"push_to_hub": True}):
        with pytest.raises(UsageError, match="variant"):
            model.save_pretrained(tmp_path / "saved", **options)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "saved")
    assert sorted(file.name for file in tmp_path.glob("saved/*.safetensors*")) == ["globe.safetensors"]
    assert_same_tensors(model, load(tmp_path / "saved"))


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a directory that save_pretrained wrote."""
    tensors = load_file(directory / "globe.safetensors")
    change(tensors)
    save_file(tensors, directory / "globe.safetensors", metadata={"format": "pt"})


LEFT = "model.layers.1.mlp.experts.3.gate_proj.weight.globe_gate_left"
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a left factor is missing": (lambda tensors: tensors.pop(LEFT), "layer 1: 7 tensors .* of family gate"),
    "a left factor is cut": (lambda tensors: tensors.update({LEFT: tensors[LEFT][1:].clone()}), "layer 1"),
    "the atoms are missing": (lambda tensors: tensors.pop("globe.up.atoms"), "globe.up.atoms is in none"),
    "a code is damaged": (lambda tensors: tensors["globe.up.codes.indices"].fill_(-2), "codes.indices is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_directories(case: str, pairs: Make, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    load(pairs().out).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(GlobeError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_load_refuses(pairs: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cache is 'lots'"):
        globe.load(pairs().out, cache="lots")
    with pytest.raises(GlobeError, match=r"no globe\.json found"):
        globe.load(tmp_path)
    with pytest.raises(UsageError, match="not factored"):
        globe.load(pairs().dense)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(pairs().out, unfinished, ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(GlobeError, match="did not finish"):
        globe.load(unfinished)
