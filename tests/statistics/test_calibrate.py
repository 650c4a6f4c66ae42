"""Activation statistics against a whole model with plain hooks; one layer in memory."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import globe  # noqa: E402
from checkpoints import TOKENS, WINDOW, calibrate_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from globe.statistics.calibration import MOMENTS, load_calibration  # noqa: E402
from globe.statistics.layerwise import Layerwise  # noqa: E402
from globe.statistics.shrinkage import damped_factor  # noqa: E402
from globe.statistics.texts import evaluation_text  # noqa: E402

# per-expert tensors; a dense first layer; a dense layer between; fused as [E, 2p, d]; linear attention; post-norm; a
# copy of all tokens for every expert
ARCHITECTURES = ("mixtral", "olmoe", "deepseek_v3", "qwen3_moe", "qwen3_5_moe", "granitemoe", "minimax", "llama4_text")


def _windows(tokenizer: Any) -> Any:
    return torch.tensor(tokenizer(evaluation_text("calibration"))["input_ids"][:TOKENS]).view(-1, WINDOW)


def _weights(checkpoint: Checkpoint, layer: int) -> list[tuple[Any, Any, Any]]:
    """Gate, up and down of every expert of a layer in fp64, read by name."""
    layout, gates, ups = checkpoint.layout, checkpoint.family("gate"), checkpoint.family("up")
    tensors = {name: value for shard in checkpoint.shards for name, value in load_file(shard.path).items()}
    down: dict[int, Any] = {}
    for name, value in tensors.items():
        place = layout.place("down", name)
        if place is not None and place[0] == layer:
            value = value.mT if layout.transposed else value
            down.update(enumerate(value) if place[1] is None else {place[1]: value}.items())
    places = [place for place, expert in enumerate(gates.experts) if expert.layer == layer]
    return [
        (gates.read(place).double(), ups.read(place).double(), down[expert].double())
        for expert, place in enumerate(places)
    ]


def _oracle(model_dir: Path, tokens_of_layer: dict[int, list[Any]], stream: Any, layer: int) -> dict[str, Any]:
    """The definitions of LayerStatistics, token by token in fp64; `stream` is what is behind the layer."""
    worth = 1 / stream.flatten(0, -2).double().square().sum(-1, keepdim=True)
    x, chosen, routing = (torch.cat(parts) for parts in zip(*tokens_of_layer[layer], strict=True))
    x, routing = x.double(), routing.double()
    found: dict[str, list[Any]] = {}
    common = (worth * x**2).sum(0) / worth.sum()

    def own_diagonal(squares: Any, weight: Any) -> Any:
        some = torch.arange(len(squares)) // 128 % 2 == 0
        if not (weight[some].sum() > 0 and weight[~some].sum() > 0):
            return common
        one, other = ((weight * squares)[part].sum(0) / weight[part].sum() for part in (some, ~some))
        away = [torch.linalg.norm((half - common) / common) ** 2 for half in (one, other)]
        agree = torch.linalg.norm((one - other) / common) ** 2 < sum(away) / 2
        return (weight * squares).sum(0) / weight.sum() if agree else common

    for expert, (gate, up, down) in enumerate(_weights(Checkpoint(model_dir), layer)):
        w = torch.where(chosen == expert, routing, 0).sum(1)
        weight = w[:, None] ** 2 * worth
        g, u = x @ gate.T, x @ up.T
        sigmoid = torch.sigmoid(g)
        phi, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
        total = max(float(weight.sum()), 1e-300)

        def mean(value: Any, weight: Any = weight, total: float = total) -> Any:
            return (value * weight).sum(0) / total

        def moment(value: Any, weight: Any = weight, total: float = total) -> Any:
            return (value * weight).T @ value / total

        gram = down.T @ down
        for name, value in {
            "share": weight.sum() / worth.sum(),
            "counts": (w != 0).sum(),
            "diagonal": own_diagonal(x**2, weight),
            "gate_rows": mean((slope * u) ** 2) * (down**2).sum(0),
            "up_rows": mean(phi**2) * (down**2).sum(0),
            "hidden": mean((phi * u) ** 2),
            "hidden_moment": moment(phi * u),
            "gate_moment": moment(slope * u) * gram,
            "up_moment": moment(phi) * gram,
            "own": moment(x),
        }.items():
            found.setdefault(name, []).append(value)
    whole = {"moment": x.T @ (worth * x) / worth.sum(), "residual": 1 / worth.mean()}
    return whole | {name: torch.stack(values) for name, values in found.items()}


def _undone(copied: Any) -> tuple[Any, Any, Any]:
    """Tokens that one expert of four was given weighed, and the others as zeros: with a choice and a weight of one."""
    copies = copied.view(4, -1, copied.shape[-1])
    mine = copies.abs().sum(-1) > 0
    assert bool((mine.sum(0) == 1).all())
    return copies.sum(0), mine.int().argmax(0)[:, None], torch.ones(copies.shape[1], 1)


def _own_moments_are_shrunk(statistics: dict[str, Any], own: Any) -> int:
    """In the layer's coordinates an expert's U Λ Uᵀ is a share of what its moment is beyond the identity.

    Gives the number of experts with one.
    """
    if statistics["own_directions"] is None:
        return 0
    directions, values = statistics["own_directions"].double(), statistics["own_values"].double()
    factor, identity = damped_factor(statistics["moment"]).double(), torch.eye(len(statistics["moment"]))
    assert directions.shape[2] == len(identity)  # all directions
    inverse = torch.linalg.inv(factor)
    undamped = inverse @ statistics["moment"].double() @ inverse.T
    for expert in values.any(1).nonzero()[:, 0].tolist():
        seen = inverse @ own[expert] @ inverse.T
        size = seen.trace() / undamped.trace()
        beyond = seen / size - undamped
        kept = directions[expert] * values[expert] @ directions[expert].T
        share = float((kept * beyond).sum() / beyond.square().sum())
        assert 0.01 < share < 1 and (kept - share * beyond).norm() < 0.01 * kept.norm()
        assert float(statistics["own_sizes"][expert]) == pytest.approx(float(size), rel=1e-3)
    alone = ~values.any(1)
    assert bool((statistics["own_sizes"][alone] == 1).all()) and not bool(alone.all())
    return int((~alone).sum())


def _plain(statistics: Any) -> dict[str, Any]:
    """Statistics with U Λ Uᵀ in place of U and Λ, in which vectors may change signs or places."""
    found = {name: value for name, value in asdict(statistics).items() if value is not None}
    directions = found.pop("own_directions", None)
    if directions is not None:
        found["own"] = directions * found.pop("own_values")[:, None] @ directions.mT
    return found


@pytest.mark.parametrize("layout", ARCHITECTURES)
def test_statistics_are_those_of_the_whole_model(layout: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = tiny(layout)
    model, tokenizer = load_model(model_dir)
    seen: dict[int, list[Any]] = {}
    streams: dict[int, list[Any]] = {}
    for number, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
                module.register_forward_pre_hook(
                    lambda _, x, n=number: seen.setdefault(n, []).append(x if x[1:] else _undone(*x))
                )
        layer.register_forward_hook(
            lambda _, x, y, n=number: streams.setdefault(n, []).append(y[0] if isinstance(y, tuple) else y)
        )
    with torch.no_grad():
        model(_windows(tokenizer))
    found = calibrate_tiny(model_dir, tmp_path / "statistics", row_moments="full", precision="fp32")
    assert found.layers == tuple(sorted(seen))
    own = 0
    for number in found.layers:
        statistics = asdict(found.layer(number))
        expected = _oracle(model_dir, seen, torch.cat(streams[number]), number)
        own += _own_moments_are_shrunk(statistics, expected.pop("own"))
        assert {name for name in statistics if not name.startswith("own_") and "fisher" not in name} == expected.keys()
        for name, value in expected.items():
            assert statistics[name].shape == value.shape
            distance = torch.linalg.norm(statistics[name].double() - value)
            assert distance <= 2e-5 * torch.linalg.norm(value.double()), (number, name)
    counted = found.about["own_moments"]
    assert counted["own"] == own
    assert own + counted["as_layer"] == sum(len(found.layer(number).counts) for number in seen)


@pytest.mark.parametrize("layout", ["minimax", "deepseek_v2", "phimoe", "qwen2_moe"])
def test_streamed_states_are_the_models_own(layout: str, tiny: Callable[[str], Path]) -> None:
    model, tokenizer = load_model(tiny(layout))
    windows = _windows(tokenizer)
    expected: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, x, y: expected.append(y))
    with torch.no_grad():
        model(windows)
    streamed = Layerwise(Checkpoint(tiny(layout)), torch.device("cpu"))
    hidden, arguments = streamed.embed(windows)
    for number, after in enumerate(expected):
        with streamed.layer(number) as layer:
            for span in streamed.batches(windows):
                hidden[span] = streamed.run(number, layer, hidden, arguments, span)
        torch.testing.assert_close(hidden, after, rtol=1e-4, atol=1e-4 * float(after.abs().max()))


def test_one_layer_has_weights_at_a_time(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, list[int]]] = []
    run = Layerwise.run

    def stacks() -> list[torch.Tensor]:
        held = [part for part in gc.get_objects() if type(part) in (torch.Tensor, torch.nn.Parameter)]
        return [part for part in held if part.shape == (8, 64, 64) and not part.is_meta]

    gc.collect()
    before = stacks()  # of other tests; held, so that no new one has their addresses
    taken = {part.data_ptr() for part in before}

    def spy(self: Layerwise, number: int, *arguments: Any) -> Any:
        there = [n for n, layer in enumerate(self.layers) if any(not part.is_meta for part in layer.parameters())]
        others = [name for name, part in self.model.named_parameters() if ".layers." not in name and not part.is_meta]
        assert others == []
        assert len({part.data_ptr() for part in stacks()} - taken) == (number != 1)  # layer 1 is dense
        loaded.append((number, there))
        return run(self, number, *arguments)

    monkeypatch.setattr(Layerwise, "run", spy)
    monkeypatch.setattr("globe.statistics.layerwise.TOKENS_AT_ONCE", 256)
    monkeypatch.setattr("globe.sizes.own._MOST", 32)  # U is not of the shape of a stack
    calibrate_tiny(tiny("qwen3_moe"), tmp_path / "statistics", fisher=False)
    assert loaded == [(number, [number]) for number in range(3) for _ in range(3)]  # 10 windows in batches of 4


def test_batches_change_rounding_only(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate_tiny(tiny("olmoe"), tmp_path / "whole", row_moments="full").layer(1)
    again = calibrate_tiny(tiny("olmoe"), tmp_path / "again", row_moments="full")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    assert again.about["warnings"] == []
    monkeypatch.setattr("globe.statistics.layerwise.TOKENS_AT_ONCE", 192)
    parts = calibrate_tiny(tiny("olmoe"), tmp_path / "parts", row_moments="full").layer(1)
    found = _plain(parts)
    for name, value in _plain(whole).items():
        least = (1e-4 if name == "own" else 1e-5) * float(value.double().abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=least)


def test_row_moments(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(choice: str) -> list[str]:
        found = calibrate_tiny(tiny("mixtral"), tmp_path / choice, row_moments=choice)
        layer = asdict(found.layer(0))
        assert all((layer[name] is not None) == found.has(name) for name in MOMENTS)
        return [name for name in MOMENTS if found.has(name)]

    assert [stored(choice) for choice in ("diagonal", "hidden", "full")] == [[], ["hidden_moment"], list(MOMENTS)]
    assert stored("auto") == ["hidden_moment"]
    monkeypatch.setattr("globe.statistics.row_moments._AUTO_BYTES", 4 * 2 * 4 * 48 * 48)
    assert stored("auto") == []


def test_bf16_products_give_the_same_statistics_but_for_their_rounding(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.compute.gemm._bf16_dots", lambda: True)
    exact = calibrate_tiny(tiny("olmoe"), tmp_path / "fp32", row_moments="full", precision="fp32")
    rounded = calibrate_tiny(tiny("olmoe"), tmp_path / "bf16", row_moments="full")
    assert (exact.about["products"], rounded.about["products"]) == ("float32", "bfloat16")
    for number in exact.layers:
        found = _plain(rounded.layer(number))
        for name, value in _plain(exact.layer(number)).items():
            distance = torch.linalg.norm(found[name].double() - value)
            most = (0.2 if name == "own" else 0.05) * torch.linalg.norm(value.double())
            assert 0 < distance <= most or name == "counts", (number, name)


def test_weights_in_fp32_are_never_rounded_to_bf16(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny("olmoe"), tmp_path / "model")
    for file in model.glob("*.safetensors"):
        save_file({name: value.float() for name, value in load_file(file).items()}, file, {"format": "pt"})
    found = calibrate_tiny(model, tmp_path / "usual").path.read_bytes()
    monkeypatch.setattr("globe.compute.gemm._bf16_dots", lambda: True)
    assert calibrate_tiny(model, tmp_path / "able").path.read_bytes() == found


def test_the_text_is_not_the_one_evaluated(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    halves = [evaluation_text(half) for half in ("calibration", "evaluation")]
    assert "".join(halves) == "\n\n".join(topics[key] for key in sorted(topics))
    about = calibrate_tiny(tiny("mixtral"), tmp_path / "statistics", text={"pydoc:topics": 1}).about
    assert about["sha256"] == hashlib.sha256(halves[0].encode()).hexdigest()
    assert about["text"] == "pydoc:topics"
    assert about["fingerprint"] == Checkpoint(tiny("mixtral")).fingerprint()
    assert (about["tokens"], about["window"], about["globe_version"]) == (TOKENS, WINDOW, globe.__version__)


def test_command(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    text, file = tmp_path / "text", tmp_path / "statistics"
    text.write_text("A router sends every token to a few experts. " * 20, encoding="utf-8")
    arguments = ["calibrate", str(tiny("olmoe")), str(file), "--text", str(text), "--window", "100", "--json", "-q"]
    said = CliRunner().invoke(cli, arguments)
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert (found["tokens"], found["text"], found["layers"]) == (400, str(text), [0, 1])
    assert load_calibration(file).about["sha256"] == found["sha256"]


def test_few_tokens_and_unused_experts_are_told(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lines = Lines()
    found = calibrate_tiny(
        tiny("deepseek_v3"), tmp_path / "statistics", text="x" * 8, tokens=8, window=4, progress=lines
    )
    assert found.about["warnings"] == lines.lines[:-1] and found.about["own_moments"]["as_layer"] == 16
    assert lines.lines[-1] == (
        "own moments of 0 of 16 experts, in 64 directions each; 16 have their layer's: no tokens, or halves of them "
        "that agree on nothing else"
    )
    assert "8 tokens are few for moments of 64 inputs; at least 256" in lines.lines[0]
    assert "of 16 experts were sent no token, first expert" in lines.lines[1]
