"""Evaluation against direct computations, and the errors of wrong input."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

from checkpoints import LAYOUTS, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe import Settings, compress, export  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.evaluation.evaluate import (  # noqa: E402
    evaluate,
    evaluate_models,
    evaluate_texts,
    evaluation_text,
    generate_sentence,
    geometric_mean,
    load_model,
)

TEXT = "A mixture holds many experts; a router chooses a few of them for every token. " * 8


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


def _log_probabilities(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids[None]).logits[0, :-1].double().log_softmax(1)


def test_halves_make_the_whole_text() -> None:
    from pydoc_data.topics import topics

    whole = evaluation_text("calibration") + evaluation_text("evaluation")
    assert whole == "\n\n".join(topics[key] for key in sorted(topics))
    assert abs(len(evaluation_text("calibration")) - len(evaluation_text("evaluation"))) <= 1


def test_unknown_half() -> None:
    with pytest.raises(UsageError, match="calibration"):
        evaluation_text("training")


def test_figures_match_a_direct_computation(mixtral: Path) -> None:
    window = 100
    model, tokenizer = load_model(mixtral)
    reference, _ = load_model(mixtral)
    with torch.no_grad():
        for weights in reference.parameters():
            weights += 0.01 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    loss = divergence = reference_loss = 0.0
    agreed = tokens = 0
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        ours, theirs = _log_probabilities(model, part), _log_probabilities(reference, part)
        rows = torch.arange(window - 1)
        loss -= ours[rows, part[1:]].sum().item()
        reference_loss -= theirs[rows, part[1:]].sum().item()
        divergence += (theirs.exp() * (theirs - ours)).sum().item()
        agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
        tokens += window - 1
    found = evaluate_models(model, tokenizer, TEXT, window=window, reference=reference)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(reference_loss / tokens), rel=1e-5)
    assert found.kl == pytest.approx(divergence / tokens, rel=1e-4)
    assert found.top1_agreement == agreed / tokens
    assert 0 < agreed < tokens


def test_against_itself(mixtral: Path) -> None:
    found = evaluate(mixtral, against=mixtral, text=TEXT, window=64)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity


def test_without_a_reference(mixtral: Path) -> None:
    found = evaluate(mixtral, text=TEXT, window=64)
    assert (found.kl, found.top1_agreement, found.reference_perplexity) == (None, None, None)


def test_default_text_and_most_tokens(mixtral: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(mixtral, window=64, max_tokens=200, progress=lambda done, total: seen.append((done, total)))
    assert found.tokens == 3 * 63
    assert "evaluation half" in found.text
    assert seen[-1] == (3, 3)


def test_text_from_a_file(mixtral: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    from_file, given = evaluate(mixtral, text=file, window=64), evaluate(mixtral, text=TEXT, window=64)
    assert from_file.perplexity == pytest.approx(given.perplexity, rel=1e-6)
    assert from_file.text == str(file)


def test_several_texts(mixtral: Path, tmp_path: Path) -> None:
    other = make_tiny("mixtral", tmp_path / "other", seed=1)
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for file, text in zip(files, (TEXT, TEXT.upper()), strict=True):
        file.write_text(text, encoding="utf-8")
    found = evaluate_texts(mixtral, files, against=other, window=64)
    assert [each.text for each in found] == list(map(str, files))
    for each, file in zip(found, files, strict=True):
        alone = evaluate(mixtral, text=file, against=other, window=64)
        assert (each.perplexity, each.kl) == pytest.approx((alone.perplexity, alone.kl), rel=1e-6)
    ratios = [each.perplexity / (each.reference_perplexity or math.nan) for each in found]
    assert geometric_mean(found) == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    apart = evaluate_texts(mixtral, files, window=64)
    assert geometric_mean(apart) == pytest.approx(math.sqrt(apart[0].perplexity * apart[1].perplexity))
    with pytest.raises(UsageError, match="no evaluation is given"):
        geometric_mean([])

    texts = [option for file in files for option in ("--text", str(file))]
    command = ["eval", str(mixtral), "--against", str(other), "--window", "64"]
    told = json.loads(CliRunner().invoke(cli, [*command, *texts, "--json"]).stdout)
    assert told["geometric_mean"] == pytest.approx(geometric_mean(found), rel=1e-6) and set(told) == {
        "texts",
        "geometric_mean",
    }
    perplexities = [each.perplexity for each in found]
    assert [row["perplexity"] for row in told["texts"]] == pytest.approx(perplexities, rel=1e-6)
    one = json.loads(CliRunner().invoke(cli, [*command, *texts[:2], "--json"]).stdout)
    assert one["perplexity"] == pytest.approx(perplexities[0], rel=1e-6)
    assert one["text"] == str(files[0]) and len(one["texts"]) == 1
    shown = CliRunner().invoke(cli, [*command, *texts]).stdout
    assert f"geometric mean of the ratios: {geometric_mean(found):.3f}" in shown and f"{ratios[1]:.3f}" in shown


def test_text_shorter_than_a_window(mixtral: Path) -> None:
    found = evaluate(mixtral, text="ten bytes.", window=512)
    assert (found.tokens, found.window) == (9, 10)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"text": " \n"}, GlobeError, "empty"),
        ({"text": "a"}, GlobeError, "at least 2"),
        ({"text": TEXT, "window": 1}, UsageError, "window"),
        ({"text": TEXT, "max_tokens": 1}, UsageError, "max tokens"),
        ({"text": TEXT, "device": "teapot"}, UsageError, "teapot"),
        ({"text": Path("nowhere.txt")}, UsageError, r"nowhere\.txt"),
    ],
)
def test_wrong_settings(mixtral: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluate(mixtral, **settings)
    assert caught.type is error


def test_text_that_is_not_utf8(mixtral: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(GlobeError, match="UTF-8"):
        evaluate(mixtral, text=file)


def test_different_tokenizers(mixtral: Path, tmp_path: Path) -> None:
    changed = make_tiny("mixtral", tmp_path / "changed")
    _, tokenizer = load_model(changed)
    tokenizer.add_tokens(["mixture"])
    tokenizer.save_pretrained(changed)
    with pytest.raises(GlobeError, match=r"256 tokens.*257"):
        evaluate(mixtral, against=changed, text=TEXT)


@pytest.mark.parametrize(
    ("removed", "message"),
    [("config.json", "no config.json"), ("tokenizer*", "no tokenizer"), ("model.safetensors", "cannot load it")],
)
def test_incomplete_directories(mixtral: Path, tmp_path: Path, removed: str, message: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(mixtral, damaged)
    for file in damaged.glob(removed):
        file.unlink()
    with pytest.raises(GlobeError, match=message):
        load_model(damaged)


def test_missing_tensors_are_not_made_up(mixtral: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(mixtral, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GlobeError, match=r"model\.norm\.weight"):
        load_model(damaged)


def test_factored_directory_is_loaded_as_it_is(tmp_path: Path) -> None:
    source = make_tiny("olmoe", tmp_path / "source", dtype="float32")
    compress(source, tmp_path / "out", Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", **WEIGHTS_ONLY))
    export(tmp_path / "out", tmp_path / "dense")
    before = sorted(tmp_path.rglob("*"))
    found = evaluate(tmp_path / "out", against=tmp_path / "dense", text=TEXT, window=64)
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert sorted(tmp_path.rglob("*")) == before


def test_factored_directory_needs_transformers_that_knows_the_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny("olmoe", tmp_path / "source")
    compress(source, tmp_path / "out", Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", **WEIGHTS_ONLY))
    monkeypatch.setitem(sys.modules, "globe.hf", None)
    with pytest.raises(GlobeError, match=r"globe\.hf"):
        load_model(tmp_path / "out")


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match="no such directory"):
        load_model(tmp_path / "absent")


def test_transformers_absent(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GlobeError, match=r"globe-moe\[hf\]"):
        load_model(mixtral)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_evaluates(layout: str, tmp_path: Path) -> None:
    found = evaluate(make_tiny(layout, tmp_path / layout, shards=2), text=TEXT, window=64, max_tokens=256)
    assert 100 < found.perplexity < 2000


def test_generation_continues_the_prompt(mixtral: Path) -> None:
    model, tokenizer = load_model(mixtral)
    sentence = generate_sentence(model, tokenizer, "A mixture", max_new_tokens=5)
    assert sentence.startswith("A mixture")
    assert sentence == generate_sentence(model, tokenizer, "A mixture", max_new_tokens=5)


def test_a_trained_mixture(tiny_olmoe: Path) -> None:
    assert evaluate(tiny_olmoe, max_tokens=2048).perplexity < 100
