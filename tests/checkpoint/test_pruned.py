"""Experts that were removed: numbers with gaps are read as transformers reads them, the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export, load  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from refusals import edit_json, refusal  # noqa: E402
from trips import load_plain, run_cli  # noqa: E402

EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
ROUTER = "model.layers.{}.mlp.gate.weight"
KEPT = {0: (0, 2, 5, 7), 2: (1, 3, 4, 6)}  # of eight, by layer
NUMBERS = {0: (0, 2, 5, 7), 2: (2, 3, 10, 11)}  # that they have in the names of tensors
SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", **WEIGHTS_ONLY)
TOKENS = torch.arange(40)[None]


def prune(source: Path, numbers: Mapping[int, tuple[int, ...]], stated: int | None = 4) -> Path:
    """Leave the experts KEPT of each layer, as many as there are numbers for, under these numbers."""
    tensors = load_file(source / "model.safetensors")
    for layer, named in numbers.items():
        kept = KEPT[layer][: len(named)]
        tensors[ROUTER.format(layer)] = tensors[ROUTER.format(layer)][list(kept)].clone()
        for family in FAMILIES:
            held = [tensors.pop(EXPERT.format(layer, expert, family)) for expert in range(8)]
            tensors |= {EXPERT.format(layer, n, family): held[e] for n, e in zip(named, kept, strict=True)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        source / "config.json", lambda config: [config.pop(key, 0) for key in ("num_experts", "num_local_experts")]
    )
    if stated is not None:
        edit_json(source / "config.json", lambda config: config.update(num_experts=stated))
    return source


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same pruned model with gaps in the numbers of its experts, and with experts 0 to 3."""
    root = tmp_path_factory.mktemp("pruned")
    for name, numbers in (("gaps", NUMBERS), ("anew", {0: range(4), 2: range(4)})):
        prune(make_tiny("qwen3_moe", root / name), {layer: tuple(each) for layer, each in numbers.items()})
    return root / "gaps", root / "anew"


def test_numbers_with_gaps_are_read_as_transformers_reads_them(pair: tuple[Path, Path]) -> None:
    gaps, anew = pair
    assert torch.equal(load_plain(gaps)(TOKENS).logits, load_plain(anew)(TOKENS).logits)
    ours, theirs = Checkpoint(gaps), Checkpoint(anew)
    for family in FAMILIES:
        mine, wanted = ours.family(family), theirs.family(family)
        assert [(e.layer, e.expert) for e in mine.experts] == [(layer, n) for layer in (0, 2) for n in range(4)]
        assert mine.experts[-2].tensor == EXPERT.format(2, 10, family)
        assert all(torch.equal(mine.read(i), wanted.read(i)) for i in range(len(wanted)))
    notes = ["layer 0 has experts 0, 2, 5, 7: taken as 0 to 3 in this order, as transformers does"]
    assert run_cli("inspect", gaps)["notes"] == notes and run_cli("inspect", anew)["notes"] == []


@pytest.mark.parametrize("families", [("gate", "up"), FAMILIES])
def test_a_trip_with_gaps_is_that_of_experts_numbered_anew(
    families: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    made, files = [], []
    for name, source in zip(("gaps", "anew"), pair, strict=True):
        out, dense = (
            compress(source, tmp_path / name, replace(SETTINGS, families=families)).directory,
            tmp_path / f"{name}-dense",
        )
        export(out, dense)
        made.append((load(out, dtype=torch.float32)(TOKENS).logits, load_plain(dense)(TOKENS).logits))
        files.append([weights_of(place) for place in (source, out, dense)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*made, strict=True))
    assert (made[0][0] - made[0][1]).abs().max() < 0.05 * made[0][1].abs().max()
    for mine, theirs in zip(*files, strict=True):
        assert {anew(name) for name in mine} == set(theirs)
        assert all(torch.equal(value, theirs[anew(name)]) for name, value in mine.items())
    assert files[0][0].keys() == files[0][2].keys()


def test_calibration_with_gaps_is_that_of_experts_numbered_anew(pair: tuple[Path, Path], tmp_path: Path) -> None:
    mine, theirs = (calibrate_tiny(source, tmp_path / f"{source.name}.safetensors", tokens=256) for source in pair)
    for layer in (0, 2):
        for name, value in vars(theirs.layer(layer)).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(mine.layer(layer), name), value), name


@pytest.mark.parametrize(
    ("numbers", "stated", "words"),
    [
        (NUMBERS, 8, ("layer 0 has experts 0, 2, 5, 7;", "config.json states 8", "state 4")),
        (NUMBERS, None, ("layer 0 has experts 0, 2, 5, 7;", "config.json states no number", "routers")),
        (
            {0: (0, 1, 2, 3), 2: (0, 1, 2)},
            4,
            (
                EXPERT.format(2, 3, "gate"),
                "is missing",
                "layer 2 has 3 routed experts, layer 0 has 4",
                "prune all layers",
            ),
        ),
        (
            {0: (0, 1, 4), 2: (0, 2, 3, 9)},
            4,
            ("source: layer 0 has 3 routed experts, layer 2 has 4",),
        ),
    ],
)
def test_what_transformers_does_not_read_is_refused(
    numbers: dict[int, tuple[int, ...]], stated: int | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    source = prune(make_tiny("qwen3_moe", tmp_path / "source"), numbers, stated)
    line = refusal(1, "inspect", source)
    assert all(word in line for word in words), line
    with pytest.raises((AssertionError, RuntimeError)):
        load_plain(source)


def test_stacks_of_different_heights_are_refused(tmp_path: Path) -> None:
    source = make_tiny("qwen3_5_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refusal(1, "inspect", source)
    assert "layer 1 has 3 routed experts, layer 0 has 4, and transformers has as many in every layer" in line
    with pytest.raises((AssertionError, RuntimeError)):
        load_plain(source)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def anew(name: str) -> str:
    """The name that a tensor has where experts are numbered anew."""
    match = re.match(r"(model\.layers\.(\d)\.mlp\.experts\.)(\d+)(\..*)", name)
    return f"{match[1]}{NUMBERS[int(match[2])].index(int(match[3]))}{match[4]}" if match else name
