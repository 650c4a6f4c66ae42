"""Healing: a tiny mixture learns from its original, or is left as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import globe  # noqa: E402
import globe.healing.heal as healing  # noqa: E402
from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Healing, Settings, compress, heal  # noqa: E402
from globe.artifact.factored import open_factored  # noqa: E402
from globe.checkpoint.tensorfile import read_tensor  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from globe.healing import descent, loss, publish  # noqa: E402
from globe.healing.loss import divergence, geometric_mean, learn  # noqa: E402
from globe.healing.parts import Moving, by_layers, learning, moving  # noqa: E402
from globe.healing.state import FOLDER  # noqa: E402
from globe.healing.texts import given_texts, samples  # noqa: E402
from globe.statistics.texts import evaluation_text  # noqa: E402
from refusals import in_process  # noqa: E402
from trained import train_small  # noqa: E402

SMALL: dict[str, Any] = {"rank": 0.5, "bank_size": 3, "outer_loops": 1, "device": "cpu", **WEIGHTS_ONLY}
QUICK: dict[str, Any] = {"own_tokens": 2048, "text_tokens": 4096, "batch": 4, "window": 64, "rate": 5e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained mixture and its factored directory."""
    root = tmp_path_factory.mktemp("heal")
    source = train_small(root / "source", steps=80)
    (root / "text.txt").write_text(evaluation_text("calibration")[:8192], encoding="utf-8")
    compress(source, root / "out", Settings(**SMALL))
    return source, root / "out"


@pytest.fixture
def pair(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The mixture, and a factored directory to be changed."""
    shutil.copytree(made[1], tmp_path / "out")
    return made[0], tmp_path / "out"


def quick(source: Path, **changed: Any) -> Healing:
    """Options of a healing that takes moments."""
    return Healing(**{**QUICK, "text": (source.parent / "text.txt",), **changed})


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def weights(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(directory).items() if name.endswith(".safetensors")}


def test_it_learns_and_says_which_tensors_moved(pair: tuple[Path, Path], made: tuple[Path, Path]) -> None:
    source, out = pair
    found = heal(out, source, quick(source, steps=24, parts=("lefts", "norms", "down")))
    assert found["kept"] == "healed" and found["steps"] == 24 and found["tokens"] == 24 * 4 * 64
    assert geometric_mean(found["after"].values()) < 0.99 * geometric_mean(found["before"].values())
    assert found["kl"][1] < found["kl"][0]
    assert len(found["before"]) == 2 and found["original"].keys() == found["before"].keys()
    assert not (out / FOLDER).exists() and not list(out.glob(".*"))
    before, after = open_factored(made[1]), open_factored(out)
    healed = set(after.manifest["healed"])
    for name, header in after.shards.items():
        for tensor, info in header.tensors.items():
            same = torch.equal(read_tensor(info), read_tensor(before.shards[name].tensors[tensor]))
            assert same is (tensor not in healed), tensor
    kinds = {kind: [name for name in healed if kind in name] for kind in ("_left", "down_proj", "norm")}
    assert all(kinds.values()) and sum(map(len, kinds.values())) == len(healed)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["healing"][0]["after"] == found["after"]
    assert {name: told["sha256"] for name, told in metrics["files"].items()} == weights(out)
    assert "## Healed" in (out / "README.md").read_text(encoding="utf-8")
    again = heal(out, source, quick(source, steps=1, rate=1e-6))  # what is healed can be healed
    assert again["before"] == pytest.approx(found["after"], rel=1e-6)


def test_what_it_says_of_the_weights_is_what_the_files_give(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pair
    carried = {name: text[:32768] for name, text in given_texts(Healing()).items()}
    monkeypatch.setattr(healing, "given_texts", lambda options: carried)
    found = heal(out, source, Healing(steps=24, **QUICK))
    text = "pydoc:topics"
    judged = globe.evaluate(out, against=source, max_tokens=2048, window=64)
    assert judged.kl is not None and judged.kl < found["kl"][0]
    assert any(label.startswith(text) for label in found["after"])
    globe.export(out, out.parent / "dense")
    dense = globe.evaluate(out.parent / "dense", max_tokens=2048, window=64)
    assert dense.perplexity == pytest.approx(judged.perplexity, rel=0.02)


def test_the_same_steps_give_the_same_bits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    shutil.copytree(out, tmp_path / "other")
    options = quick(source, steps=6)
    first, second = heal(out, source, options), heal(tmp_path / "other", source, options)
    assert first["kept"] == "healed" and first["after"] == second["after"]
    assert weights(out) == weights(tmp_path / "other")


class Killed(BaseException):
    """What a test raises where a process would die."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Save after every step, and die at the beginning of one."""
    calls = iter(range(1 << 20))

    def dying(*arguments: Any) -> float:
        if next(calls) == step:
            raise Killed
        return learn(*arguments)

    monkeypatch.setattr(descent, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(descent, "_SAVE_SHARE", float("inf"))
    monkeypatch.setattr(descent, "learn", dying)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_stopped_run_goes_on_to_the_same_bits(
    layers: int | None, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pair
    shutil.copytree(out, tmp_path / "other")
    options, before = quick(source, steps=6, layers_at_a_time=layers), hashes(out)
    killed_at(monkeypatch, 3)
    with pytest.raises(Killed):
        heal(out, source, options)
    assert hashes(out) == before and (out / FOLDER / "state.pt").exists()
    with pytest.raises(UsageError, match=r"other options or texts: .*rate.*--fresh"):
        heal(out, source, quick(source, steps=6, rate=1e-3))
    killed_at(monkeypatch, 1 << 19)
    calls: list[int] = []
    monkeypatch.setattr(descent, "learn", lambda *given: calls.append(1) or learn(*given))
    resumed = heal(out, source, options)
    assert len(calls) == 3 and resumed["steps"] == 6
    straight = heal(tmp_path / "other", source, options)
    assert resumed["after"] == straight["after"] and resumed["kl"] == straight["kl"]
    assert weights(out) == weights(tmp_path / "other")


def test_fresh_forgets_a_stopped_run(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair
    killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        heal(out, source, quick(source, steps=3, own_tokens=0))
    calls: list[int] = []
    monkeypatch.setattr(descent, "learn", lambda *given: calls.append(1) or learn(*given))
    assert heal(out, source, quick(source, steps=4, own_tokens=0), fresh=True)["steps"] == 4
    assert len(calls) == 4


@pytest.mark.parametrize("moves", range(1, 5))
def test_killed_while_files_are_put_in_place(
    moves: int, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pair
    options, calls, replace = quick(source, steps=6, own_tokens=0), iter(range(1 << 20)), os.replace

    def dying(*names: Any) -> None:
        if Path(names[1]).parent == out and next(calls) == moves - 1:
            raise Killed
        replace(*names)

    monkeypatch.setattr(publish.os, "replace", dying)
    with pytest.raises(Killed):
        heal(out, source, options)
    monkeypatch.undo()
    assert not (out / "config.json").exists()  # visibly not whole
    with pytest.raises(GlobeError, match=r"config\.json is missing"):
        open_factored(out)
    heal(out, source, quick(source, steps=1, rate=1e-6, own_tokens=0))  # puts the rest in place first
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["healing"][0]["steps"] == 6
    found = hashes(out)
    assert all(found[name] == told["sha256"] for name, told in metrics["files"].items())
    assert not (out / FOLDER).exists()


def test_what_was_made_anew_is_not_overwritten(
    pair: tuple[Path, Path], made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pair

    def dying(*names: Any) -> None:
        if Path(names[1]).parent == out:
            raise Killed
        replace(*names)

    replace = os.replace
    monkeypatch.setattr(publish.os, "replace", dying)
    with pytest.raises(Killed):
        heal(out, source, quick(source, steps=6, own_tokens=0))
    monkeypatch.undo()
    for name in hashes(made[1]):  # as a compression with other settings would
        shutil.copy(made[1] / name, out / name)
    bank = out / "globe-bank.safetensors"
    bank.write_bytes(bank.read_bytes()[:-1] + b"\1")
    before = hashes(out)
    with pytest.raises(UsageError, match=r"holds a healing of other options or texts: files\.globe-bank.*--fresh"):
        heal(out, source, quick(source, steps=6, own_tokens=0))
    assert hashes(out) == before


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_what_gets_worse_is_not_written(rate: float, pair: tuple[Path, Path]) -> None:
    source, out = pair
    before = hashes(out)
    found = heal(out, source, quick(source, steps=3, rate=rate, own_tokens=0))
    assert found["kept"] == "start" and hashes(out) == before and not (out / FOLDER).exists()
    json.loads(json.dumps(found, allow_nan=False))


def test_minutes_end_it(pair: tuple[Path, Path]) -> None:
    source, out = pair
    found = heal(out, source, quick(source, minutes=0.1))
    assert found["seconds"] >= 6.0 and found["options"]["steps"] is None
    assert found["tokens"] == 256 * found["steps"]


def test_only_the_parts_that_are_named_move(made: tuple[Path, Path]) -> None:
    out = made[1]
    factored = open_factored(out)
    model, _ = load_model(out)
    for part, shape in (("norms", 1), ("lefts", 3), ("down", 3)):
        found, stored = moving(model, factored, (part,))
        assert {each.part for each in found} == {part} and {each.parameter.ndim for each in found} == {shape}
        for each in found:
            for name, value in each.values():
                assert torch.equal(read_tensor(stored[name]).float(), value)


def test_layers_take_turns(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair
    factored = open_factored(out)
    parts, _ = moving(load_model(out)[0], factored, ("lefts", "norms"))
    first, second = by_layers(parts, 1)
    assert {each.name.split(".")[2] for each in first} == {"0"} and "model.norm.weight" in {e.name for e in second}
    assert by_layers(parts, 2) == by_layers(parts, None) == [parts]
    moved, step = [], descent._step

    def watched(optimiser: torch.optim.Optimizer, share: float, group: list[Moving]) -> None:
        step(optimiser, share, group)
        assert all(each.master.grad is not None and each.parameter.grad is None for each in group)
        assert len(optimiser.state) == len(group)
        moved.append((group[0].name.split(".")[2], round(share, 2)))

    monkeypatch.setattr(descent, "_step", watched)
    found = heal(out, source, quick(source, steps=24, layers_at_a_time=1, own_tokens=0))
    assert [layer for layer, _ in moved] == 2 * (6 * ["0"] + 6 * ["1"])
    assert moved[0][1] == moved[6][1] == 0.1  # every turn begins anew
    assert found["kept"] == "healed" and found["kl"][1] < found["kl"][0]


def test_masters_keep_what_bf16_does_not(tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "source", dtype="float32")
    compress(source, tmp_path / "out", Settings(**{**SMALL, "outer_loops": 0}))
    model, _ = load_model(tmp_path / "out", dtype=torch.bfloat16)
    parts, stored = moving(model, open_factored(tmp_path / "out"), ("lefts", "norms", "down"))
    for each in parts:
        assert each.parameter.dtype == torch.bfloat16 and each.master.dtype == torch.float32
        assert all(torch.equal(read_tensor(stored[name]).float(), value) for name, value in each.values())
    down = next(each for each in parts if each.part == "down")
    assert stored[down.stored[0]].dtype == "F32" and not torch.equal(down.parameter.float(), down.master)
    down.set(down.master + 1e-6)
    assert torch.equal(down.parameter, down.master.bfloat16())
    with learning(parts):
        for _ in range(2):
            (down.parameter * 0.5).sum().backward()
    assert torch.equal(down.master.grad, torch.ones_like(down.master))
    assert down.parameter.grad is None and not down.parameter.requires_grad


@pytest.mark.parametrize(
    ("stored", "fast", "told", "wanted"),
    [
        ("bfloat16", True, "auto", torch.bfloat16),
        ("bfloat16", False, "auto", torch.float32),
        ("float32", True, "auto", torch.float32),
        ("bfloat16", True, "fp32", torch.float32),
        ("float32", False, "bf16", torch.bfloat16),
    ],
)
def test_bf16_where_it_is_fast_and_stored(
    stored: str, fast: bool, told: str, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny("olmoe", tmp_path / "source", dtype=stored)
    monkeypatch.setattr(healing, "fast_bf16", lambda device: fast)
    assert healing._dtype(told, source, torch.device("cpu")) == wanted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_in_either_precision(
    precision: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pair
    loaded: list[torch.dtype] = []

    def seen(*arguments: Any) -> float:
        loaded.extend(each.dtype for each in arguments[:2])
        return learn(*arguments)

    monkeypatch.setattr(descent, "learn", seen)
    found = heal(out, source, quick(source, steps=12, own_tokens=0, precision=precision))
    assert found["kept"] == "healed" and found["precision"] == precision
    assert set(loaded) == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


@pytest.mark.parametrize("layout", ["granitemoe", "mixtral", "qwen2_moe", "qwen3_5_moe", "deepseek_v2"])
def test_parameters_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    source = make_tiny(layout, tmp_path / "source", shards=2, dtype="bfloat16")
    compress(source, tmp_path / "out", Settings(**{**SMALL, "outer_loops": 0}))
    model, _ = load_model(tmp_path / "out")
    found, stored = moving(model, open_factored(tmp_path / "out"), ("lefts", "norms", "down"))
    assert {each.part for each in found} == {"lefts", "norms", "down"}
    for each in found:
        for name, value in each.values():
            assert torch.equal(read_tensor(stored[name]).float(), value), name


def test_down_that_is_factored_moves_as_left_factors(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source", dtype="bfloat16")
    settings = Settings(**{**SMALL, "outer_loops": 0, "families": ("gate", "up", "down")})
    compress(source, tmp_path / "out", settings)
    model, _ = load_model(tmp_path / "out")
    factored = open_factored(tmp_path / "out")
    lefts, _ = moving(model, factored, ("lefts",))
    assert any("down_left" in each.name for each in lefts)
    with pytest.raises(GlobeError, match="none of the parts down"):
        moving(model, factored, ("down",))


def test_the_gradient_is_that_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    expected, found = (torch.randn(5, 7, generator=generator) for _ in range(2))
    found.requires_grad_(True)
    loss = torch.nn.functional.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True)
    loss.backward()
    value, gradient = divergence(expected, found.detach())
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, found.grad)


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    value, gradient = divergence(expected, found)
    monkeypatch.setattr(loss, "_ROW_BYTES", 2 * 4 * 7)
    few, scaled = divergence(expected.bfloat16(), found.bfloat16(), 0.5)
    assert few == pytest.approx(value, rel=0.05) and scaled.dtype == torch.bfloat16
    torch.testing.assert_close(2 * scaled.float(), gradient, atol=0.02, rtol=0.05)


def test_samples_follow_from_the_seed(made: tuple[Path, Path]) -> None:
    teacher, tokenizer = load_model(made[0])
    options = Healing(own_tokens=320, window=32)
    drawn = [
        samples(teacher, tokenizer, each, lambda steps: None)
        for each in (options, options, Healing(seed=1, own_tokens=320, window=32))
    ]
    assert drawn[0].shape == (10, 32) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_refusals(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    with pytest.raises(GlobeError, match="not factored; expected a directory written by globe compress"):
        heal(source, source)
    with pytest.raises(GlobeError, match="no such directory"):
        heal(tmp_path / "none", source)
    other = make_tiny("olmoe", tmp_path / "other")
    with pytest.raises(GlobeError, match=r"fingerprint is .*was made of .*give the checkpoint that was compressed"):
        heal(out, other)
    assert not (out / FOLDER).exists()
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(GlobeError, match=r"short\.txt\) has \d+ tokens; expected at least two windows"):
        heal(out, source, Healing(text=(tmp_path / "short.txt",), **QUICK))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"parts": ("lefts", "codes")}, "parts are lefts,codes; expected some of lefts, norms, down"),
        ({"parts": ()}, "parts are none"),
        ({"minutes": 0.0}, "minutes is 0.0; expected a positive number"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"layers_at_a_time": 0}, "layers_at_a_time is 0; expected at least 1"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected one of auto, fp32, bf16"),
        ({"window": 1}, "window is 1; expected at least 2"),
    ],
)
def test_options_that_make_no_sense(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Healing(**changed)


def test_the_command_prints_one_object(pair: tuple[Path, Path]) -> None:
    source, out = pair
    few = ("--steps", 2, "--text", source.parent / "text.txt", "--own-tokens", 256, "--window", 64, "--quiet", "--json")
    done = in_process("heal", out, "--against", source, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 2 and found["kept"] in ("healed", "start") and done.stderr == ""
    refused = in_process("heal", source, "--against", source, *few)
    assert refused.returncode == 1 and "not factored" in refused.stderr
