"""Factors in fewer bits: what the files hold is what is measured, counted, exported and run; damage is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.artifact.export import export  # noqa: E402
from globe.artifact.factored import bank_name, left_name, open_factored  # noqa: E402
from globe.checkpoint.formats.packed import PACKED, SCALE, SHAPE  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.tensorfile import read_header, read_tensor  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.hf import FactoredExperts, set_cache  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.runs.store import FOLDER  # noqa: E402
from globe.settings import Settings  # noqa: E402
from killed import Killer  # noqa: E402
from refusals import edit_json, edit_tensor, in_process, json_variants, refusal  # noqa: E402
from trips import digests  # noqa: E402

SMALL: dict[str, Any] = {"rank": 32, "bank_size": 3, "joint_steps": 1, "device": "cpu", "threads": 1, **WEIGHTS_ONLY}
FOUR: dict[str, Any] = {**SMALL, "left_bits": 4, "atom_bits": 8}
LEFT = "model.layers.1.mlp.experts.5.gate_proj.weight.globe_gate_left"
SHARD = "globe-00002-of-00002.safetensors"
BANK = "globe-bank.safetensors"
IDS = torch.arange(24).view(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("finished") / "out", Settings(**FOUR)).directory


@pytest.fixture
def factored(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "factored"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def load(directory: Path) -> Any:
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(told.values()), told
    return model


def bytes_of_factors(directory: Path) -> int:
    """Of the tensors that stand for the touched matrices."""
    found = 0
    for file in directory.glob("*.safetensors"):
        for name, info in read_header(file).tensors.items():
            mine = "_left" in name.rpartition(".")[2] or name.startswith("globe.")
            found += info.nbytes if mine else 0
    return found


@pytest.mark.parametrize(
    ("layout", "bits"),
    [
        ("olmoe", {"factor_bits": 8}),
        ("granitemoe", {"left_bits": 4, "atom_bits": 3, "families": ("gate", "up", "down")}),
        ("qwen3_5_moe", {"left_bits": 3, "families": ("gate",), "group_size": 32}),
        ("mixtral", {"atom_bits": 4, "families": ("gate", "up", "down"), "scope": "layer"}),
    ],
    ids=str,
)
def test_files_metrics_export_and_transformers_agree(layout: str, bits: dict[str, Any], tmp_path: Path) -> None:
    source = make_tiny(layout, tmp_path / "source", dtype="float32")
    settings = Settings(**{**SMALL, **bits})
    metrics = compress(source, tmp_path / "out", settings).metrics
    assert json.loads((tmp_path / "out" / "globe.json").read_text())["format_version"] == 3
    checkpoint = Checkpoint(source)
    families = {name: checkpoint.family(name) for name in settings.families}
    touched = sum(len(family) * family.p * family.d for family in families.values())
    assert metrics["ratio"]["touched"] == pytest.approx(bytes_of_factors(tmp_path / "out") / 2 / touched, abs=1e-5)
    left, atoms = settings.stored_bits
    assert metrics["bits"] == {"lefts": left, "atoms": atoms, "group": settings.group_size}

    export(tmp_path / "out", tmp_path / "dense")
    dense = Checkpoint(tmp_path / "dense")
    for name, family in families.items():
        exported = dense.family(name)
        lost = sum(
            float((family.read(i).double() - exported.read(i).double()).square().sum()) for i in range(len(family))
        )
        whole = sum(float(family.read(i).double().square().sum()) for i in range(len(family)))
        assert metrics["families"][name]["relative_error"] == pytest.approx(lost / whole, rel=1e-4)

    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(load(tmp_path / "dense")), rtol=1e-4, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_fewer_bits_are_fewer_bytes_and_larger_errors(source: Path, finished: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (16, 8, 4, 3):
        metrics = compress(source, tmp_path / str(bits), Settings(**SMALL, factor_bits=bits)).metrics
        found[bits] = metrics["ratio"]["touched"], metrics["families"]["gate"]["relative_error"]
    assert found[16][0] > found[8][0] > found[4][0] > found[3][0]
    assert found[8][1] == pytest.approx(found[16][1], rel=0.02)
    assert found[16][1] < found[4][1] < found[3][1] < 1
    assert json.loads((tmp_path / "16" / "globe.json").read_text())["format_version"] == 2


def test_in_a_metric_and_with_corrections(source: Path, tmp_path: Path) -> None:
    """Corrections are computed with the left factors as they are stored, so that OUT runs as its export does."""
    calibrate_tiny(source, tmp_path / "c.safetensors")
    measured = {**SMALL, "calibrate": str(tmp_path / "c.safetensors"), "factor_bits": 4, "correct": "down"}
    metrics = compress(source, tmp_path / "out", Settings(**measured)).metrics
    assert all(0 < metrics["families"][name]["weighted_error"] < 0.5 for name in ("gate", "up"))
    assert "gate: round" in [stage["name"] for stage in metrics["stages"]]
    assert all(layer["after"] <= layer["before"] for layer in metrics["corrections"])
    export(tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "dense")), rtol=0.1, atol=0.05)


def test_scales_take_up_powers_of_two(source: Path, tmp_path: Path) -> None:
    """Weights of another size have the same integers, errors and, but for the power, values."""
    packed, made = [], []
    for exponent in (0, -90):
        place = tmp_path / str(exponent)
        shutil.copytree(source, place / "source")
        for layer in range(2):
            for expert in range(8):
                name = f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
                edit_tensor(place / "source", name, lambda weights, e=exponent: weights * 2.0**e)
        metrics = compress(place / "source", place / "out", Settings(**{**FOUR, "families": ("gate",)})).metrics
        found = open_factored(place / "out")
        product = (
            found.lefts("gate", LEFT.removesuffix(".globe_gate_left"))[0].double()
            @ found.bank("gate")
            .mixture(found.manifest["families"]["gate"]["tensors"][LEFT.removesuffix(".globe_gate_left")][0])
            .double()
        )
        made.append((metrics["families"]["gate"]["relative_error"], product * 2.0**-exponent))
        packed.append({name: read_tensor(info) for name, info in found.tensors.items() if name.endswith(PACKED)})
    assert packed[0].keys() == packed[1].keys() and len(packed[0]) == 17
    assert all(torch.equal(value, packed[1][name]) for name, value in packed[0].items())
    assert made[0][0] == made[1][0]
    torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as running:
        yield running


@pytest.mark.parametrize(
    "place",
    [
        {"place": "globe.fit.stages:round_bank", "entered": True},
        {"place": "globe.fit.stages:round_bank"},
        {"place": "globe.fit.stored_lefts:round_with_feedback", "call": 21},
    ],
    ids=["before atoms", "atoms rounded", "in the second shard"],
)
@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(
    place: dict[str, Any], killer: Killer, source: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert killer.run(source, out, FOUR, **place) == -9
    assert not (out / "config.json").exists() and (out / FOLDER).is_dir()
    lines = Lines()
    compress(source, out, Settings(**FOUR), progress=lines)
    assert digests(out) == digests(finished)


def test_the_cache_keeps_integers(finished: Path) -> None:
    model = load(finished)
    expected, before = logits(model), model.globe_stats()["bytes"]
    set_cache(model, "2GiB", bits=8)
    assert model.globe_stats()["entries"] == 0
    experts = next(module for module in model.modules() if isinstance(module, FactoredExperts))
    like = torch.empty(0)
    for expert in range(3):
        held = experts.mixture("gate", expert, like)
        place = experts.places["gate"]
        composed = place.bank.compose(place.row(expert), torch.float32)
        step = composed.abs().unflatten(1, (-1, 32)).amax(-1) / 127
        square = (held - composed).square().unflatten(1, (-1, 32)).mean(-1)
        assert bool((square.sqrt() <= 0.51 * step + 1e-9).all())
    logits(model)
    assert model.globe_stats()["bytes"] < 0.6 * before
    set_cache(model, 0)
    assert torch.equal(logits(model), expected)
    with pytest.raises(UsageError, match="cache_bits is 4; expected 16 or 8"):
        set_cache(model, 0, bits=4)


def test_left_factors_stay_packed_in_other_dtypes(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.bfloat16)
    experts = next(module for module in model.modules() if isinstance(module, FactoredExperts))
    kinds = {name: buffer.dtype for name, buffer in experts.named_buffers()}
    assert kinds[f"gate_left{PACKED}"] == torch.int32 and kinds[f"gate_left{SCALE}"] == torch.bfloat16
    assert not any("gate" in name for name, _ in experts.named_parameters())
    experts.double()
    assert experts.get_buffer(f"gate_left{SCALE}").dtype == torch.bfloat16


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / "globe.json", change)


def poked(tensor: str, value: float) -> Callable[[Path], object]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values.view(-1)[0] = value
        return values

    return lambda directory: edit_tensor(directory, tensor, change)


def shortened(tensor: str) -> Callable[[Path], object]:
    return lambda directory: edit_tensor(directory, tensor, lambda values: values[..., :-1])


ATOMS = bank_name("gate", "atoms")
DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "words cut": (shortened(LEFT + PACKED), (LEFT + PACKED, "I32 [32, 3]", "I32 [32, 4]")),
    "scales cut": (shortened(LEFT + SCALE), (LEFT + SCALE, "BF16 [32, 0]", "BF16 [32, 1]")),
    "words of another kind": (lambda directory: edit_tensor(directory, LEFT + PACKED, lambda words: words.long()),
                              (LEFT + PACKED, "I64", "I32")),
    "scale NaN": (poked(LEFT + SCALE, float("nan")), (LEFT + SCALE, "nan at [0, 0]", "compress again")),
    "scale zero": (poked(LEFT + SCALE, 0.0), (LEFT + SCALE, "holds 0 at [0, 0]")),
    "scale infinite": (poked(ATOMS + SCALE, float("inf")), (ATOMS + SCALE, "holds inf")),
    "another shape": (poked(ATOMS + SHAPE, 7), (ATOMS + SHAPE, "holds [7, 64]", "expected [32, 64]")),
    "atoms cut": (shortened(ATOMS + PACKED), (ATOMS + PACKED, "I32 [3, 32, 15]", "I32 [3, 32, 16]")),
    "other bits": (manifest(lambda value: value["families"]["gate"]["packed"].update(bits=8)),
                   (PACKED, "I32 [32, 4]", "I32 [32, 8]")),
    "unknown bits": (manifest(lambda value: value["families"]["gate"]["packed"].update(bits=5)),
                     ("globe.json", "{'bits': 5, 'group': 32}")),
    "another group": (manifest(lambda value: value["banks"]["gate"]["packed"].update(group=64)),
                      (ATOMS + SCALE, "BF16 [3, 32, 2]", "BF16 [3, 32, 1]")),
    "a group that does not divide": (manifest(lambda value: value["banks"]["gate"]["packed"].update(group=48)),
                                     ("globe.json", "rows of 64", "48")),
    "not said to be packed": (manifest(lambda value: value["families"]["gate"].pop("packed")),
                              ("globe_gate_left is missing", "BF16")),
    "said in version 2": (manifest(lambda value: value.update(format_version=2)),
                          ("globe.json", "factors are packed in version 2")),
    "newer version": (manifest(lambda value: value.update(format_version=5)), ("format version 5", "update")),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_export_of_a_damaged_directory(case: str, factored: Path, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    damage(factored)
    line = refusal(1, "export", factored, tmp_path / "dense")
    for word in words:
        assert word in line
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (poked(LEFT + SCALE, float("nan")), "gate_left_scale holds nan"),
        (poked(ATOMS + SCALE, 0.0), "globe.gate.atoms_scale holds 0"),
        (shortened(LEFT + PACKED), "layer 1: .* are the left factors of family gate"),
        (shortened(ATOMS + SCALE), "globe.gate.atoms_scale"),
        (lambda directory: edit_json(directory / "config.json", lambda config: config["quantization_config"][
            "packed"]["lefts"]["gate"].update(bits=7)), "packed lefts are .*'bits': 7"),
    ],
    ids=["left scale", "atom scale", "left words", "atom scales", "bits"],
)  # fmt: skip
def test_transformers_refuses_damage(damage: Callable[[Path], object], words: str, factored: Path) -> None:
    damage(factored)
    (factored / "globe.json").unlink()  # as a directory that save_pretrained wrote
    with pytest.raises((GlobeError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(factored)


def test_any_node_of_what_is_packed_may_be_damaged(finished: Path, tmp_path: Path) -> None:
    """A manifest whose `packed` is anything else is refused in words, and never read as something else."""
    whole = json.loads((finished / "globe.json").read_text(encoding="utf-8"))
    directory = Path(shutil.copytree(finished, tmp_path / "factored"))
    tried = 0
    for told in ("families", "banks"):
        for what, value in json_variants(whole[told]["gate"]["packed"], (None, -1, 0, 7, "x", [], {}, 1.5, True)):
            changed = json.loads(json.dumps(whole))
            changed[told]["gate"]["packed"] = value
            (directory / "globe.json").write_text(json.dumps(changed), encoding="utf-8")
            with pytest.raises(GlobeError):
                open_factored(directory)
                pytest.fail(what)
            tried += 1
    assert tried >= 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "24", "--left-bits", "4"), ("family gate", "rank is 24", "groups of 32", "--rank 32")),
        (("--rank", "32", "--factor-bits", "8", "--group-size", "64"), ("rank is 32", "groups of 64")),
        (("--rank", "30", "--atom-bits", "4", "--group-size", "48"), ("64 columns", "groups of 48", "--atom-bits 16")),
        (("--factor-bits", "5"), ("factor_bits is 5; expected 16, 8, 4 or 3",)),
        (("--left-bits", "2"), ("left_bits is 2",)),
        (("--group-size", "16"), ("group_size is 16; expected a value from 32 to 128",)),
    ],
    ids=" ".join,
)
def test_bits_that_do_not_fit_are_refused_before_any_work(
    options: tuple[str, ...], words: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    line = refusal(2, "compress", source, tmp_path / "out", "--calibrate", "none", *options)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_packed_left_factors_do_not_heal(source: Path, finished: Path) -> None:
    line = refusal(2, "heal", finished, "--against", source, "--steps", "1")
    assert "4 bits" in line and "--parts norms" in line and "--left-bits 16" in line


def test_inspect_and_the_card_say_the_bits(source: Path, finished: Path) -> None:
    done = in_process("inspect", source, "--factor-bits", "4", "--json")
    found, plain = json.loads(done.stdout), json.loads(in_process("inspect", source, "--json").stdout)
    assert found["bits"] == {"lefts": 4, "atoms": 4, "group": 32} and plain["bits"]["lefts"] == 16
    assert found["choices"][0]["ratio"]["touched"] < 0.35 * plain["choices"][0]["ratio"]["touched"]
    assert all(choice["rank"] % 32 == 0 for choice in found["choices"])
    card = (finished / "README.md").read_text(encoding="utf-8")
    assert "Left factors are stored in 4 bits, atoms in 8" in card


def test_names(finished: Path) -> None:
    found = open_factored(finished)
    assert LEFT == left_name(LEFT.removesuffix(".globe_gate_left"), "gate")
    assert {LEFT + PACKED, LEFT + SCALE, LEFT + SHAPE} <= set(found.tensors) and LEFT not in found.tensors
