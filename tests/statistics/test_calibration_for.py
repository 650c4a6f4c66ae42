"""Which statistics a compression takes, what it does without them, and what calibration refuses."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from families import make_job  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.runs.job import Job  # noqa: E402
from globe.runs.stages import Stages  # noqa: E402
from globe.runs.store import RunStore  # noqa: E402
from globe.settings import Settings  # noqa: E402
from globe.statistics.calibrate import FILE, calibration_for  # noqa: E402
from globe.statistics.calibration import MOMENTS  # noqa: E402


def job_of(stages: Stages, **settings: Any) -> Job:
    return replace(make_job(Settings(**settings)), stages=stages)


def _drop(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors[name]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return change


def _damage(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].fill_(torch.nan)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (lambda model: (model / "tokenizer.json").unlink(), {}, "no tokenizer|tokenizer cannot"),
        (_drop("model.layers.1.input_layernorm.weight"), {}, "lacks weight of MixtralRMSNorm .layer 1."),
        (_drop("model.embed_tokens.weight"), {}, "lacks weight of Embedding"),
        (_damage, {}, "layer 1 gives values that are not finite"),
        (None, {"text": "too short"}, "has 9 tokens; expected at least two windows of 64"),
        (None, {"tokens": 100}, "tokens is 100; expected at least two windows of 64"),
        (None, {"window": 1}, "window is 1"),
        (None, {"window": 1024, "tokens": 4096}, "window is 1024; the model knows 512 positions"),
        (None, {"row_moments": "some"}, "row moments is 'some'; expected one of auto, diagonal, hidden, full"),
        (None, {"precision": "fp8"}, "precision is 'fp8'; expected auto or fp32"),
        (None, {"device": "toaster"}, "not a torch device"),
        (None, {"text": Path("nowhere")}, "nowhere: No such file"),
    ],
)
def test_refusals(
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    told: str,
    tmp_path: Path,
) -> None:
    model = make_tiny("mixtral", tmp_path / "model")
    if change is not None:
        for file in ("tokenizer_config.json",) if "tokenizer" in told else ():
            (model / file).unlink()
        change(model)
    with pytest.raises(GlobeError, match=told):
        calibrate_tiny(model, tmp_path / "statistics", **options)
    assert not (tmp_path / "statistics").exists()


def test_experts_of_another_form(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts
    forward = experts.forward
    monkeypatch.setattr(experts, "forward", lambda *arguments: forward(*arguments).clamp(max=0.01))
    with pytest.raises(GlobeError, match=r"MixtralExperts is not down h\(gate x, up x\)"):
        calibrate_tiny(tiny("mixtral"), tmp_path / "statistics")


def test_architecture_that_transformers_lacks(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Unrecognized configuration class\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)
    with pytest.raises(GlobeError, match="transformers cannot run it: Unrecognized configuration class$"):
        calibrate_tiny(tiny("mixtral"), tmp_path / "statistics")


def test_an_error_of_the_models_own_code(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = transformers.models.mixtral.modeling_mixtral.MixtralAttention
    monkeypatch.setattr(attention, "forward", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(GlobeError, match="transformers cannot run it: .*size"):
        calibrate_tiny(tiny("mixtral"), tmp_path / "statistics")


def test_choices_of_a_compression(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, lines = Checkpoint(tiny("mixtral")), Lines()
    assert calibration_for(checkpoint, job_of(Stages(lines), calibrate="none"), tmp_path) is None
    assert lines.lines == []
    stages = Stages(lines)
    made = calibration_for(checkpoint, job_of(stages, calibrate="pydoc", calibration_tokens=1024), tmp_path)
    assert made is not None and made.path == tmp_path / FILE
    assert [stage.name for stage in stages.records] == ["calibrate", "fisher"]
    assert "calibrated on 1,024 tokens of pydoc" in lines.lines[-1]

    stages, before = Stages(lines), made.path.stat().st_mtime_ns
    assert calibration_for(checkpoint, job_of(stages, calibrate="pydoc", calibration_tokens=1024), tmp_path) == made
    assert (stages.records, made.path.stat().st_mtime_ns) == ([], before)
    assert "calibrated before, on 1,024 tokens" in lines.lines[-1]
    assert calibration_for(checkpoint, job_of(stages, calibrate=str(made.path)), tmp_path) == made

    more = calibration_for(checkpoint, job_of(stages, calibrate="auto", calibration_tokens=1536), tmp_path)
    assert more is not None and more.about["tokens"] == 1536
    with pytest.raises(GlobeError, match="made of another checkpoint than .*; run globe calibrate on this one"):
        calibration_for(Checkpoint(tiny("olmoe")), job_of(stages, calibrate=str(made.path)), tmp_path)
    with pytest.raises(GlobeError, match="cannot be read"):
        calibration_for(checkpoint, job_of(stages, calibrate=str(tmp_path / "nowhere")), tmp_path)


def test_what_the_families_need_is_measured(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, lines = Checkpoint(tiny("mixtral")), Lines()

    def moments(*families: str) -> list[str]:
        job = job_of(Stages(lines), calibrate="pydoc", calibration_tokens=1024, families=families)
        found = calibration_for(checkpoint, job, tmp_path)
        assert found is not None
        return [name for name in MOMENTS if found.has(name)]

    assert moments("gate", "up") == []
    assert moments("gate", "down") == ["hidden_moment"]  # what is there lacks it
    assert "calibrated on" in lines.lines[-1]
    assert moments("up") == ["hidden_moment"]  # what is there has all that is needed, and more
    assert "calibrated before" in lines.lines[-1]


def test_auto_goes_on_without_what_it_needs(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = shutil.copytree(tiny("mixtral"), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    lines = Lines()
    assert calibration_for(Checkpoint(bare), job_of(Stages(lines), calibrate="auto"), tmp_path) is None
    assert len(lines.lines) == 1 and "weights only, without activation statistics" in lines.lines[0]
    assert "no tokenizer" in lines.lines[0]
    with pytest.raises(GlobeError, match="no tokenizer"):
        calibration_for(Checkpoint(bare), job_of(Stages(lines), calibrate="pydoc"), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert calibration_for(Checkpoint(tiny("mixtral")), job_of(Stages(lines), calibrate="auto"), tmp_path) is None
    assert "needs transformers: pip install" in lines.lines[-1]


def test_place_of_the_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        calibrate_tiny(tiny("mixtral"), tmp_path / "nowhere" / "statistics")
    with pytest.raises(UsageError, match="is a directory"):
        calibrate_tiny(tiny("mixtral"), tmp_path)


@pytest.mark.parametrize("place", ["forward", "tokenizer", "buffers"])
def test_auto_goes_on_after_an_error_of_the_models_own_code(
    place: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today\nsecond line")

    mixtral, whose = transformers.models.mixtral.modeling_mixtral, {}
    whose["forward"] = (mixtral.MixtralAttention, "forward")
    whose["tokenizer"] = (transformers.PreTrainedTokenizerBase, "__call__")
    whose["buffers"] = (mixtral.MixtralPreTrainedModel, "_init_weights")
    monkeypatch.setattr(*whose[place], broken)
    checkpoint, lines = Checkpoint(tiny("mixtral")), Lines()
    assert (
        calibration_for(checkpoint, job_of(Stages(lines), calibrate="auto", calibration_tokens=1024), tmp_path) is None
    )
    assert len(lines.lines) == (1 if place == "tokenizer" else 2)
    assert all(line.endswith("transformers cannot run it: not today") for line in lines.lines)
    assert not list(tmp_path.iterdir())
    with pytest.raises(GlobeError, match="not today"):
        calibration_for(checkpoint, job_of(Stages(lines), calibrate="pydoc", calibration_tokens=1024), tmp_path)


def test_auto_stops_at_damaged_weights(tmp_path: Path) -> None:
    model = make_tiny("mixtral", tmp_path / "model")
    _damage(model)
    with pytest.raises(GlobeError, match="layer 1 gives values that are not finite"):
        calibration_for(Checkpoint(model), job_of(Stages(Lines()), calibrate="auto", calibration_tokens=1024), tmp_path)


def test_few_tokens_are_cut_into_short_windows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = calibration_for(
        Checkpoint(tiny("mixtral")), job_of(Stages(Lines()), calibrate="pydoc", calibration_tokens=64), tmp_path
    )
    assert found is not None and (found.about["tokens"], found.about["window"]) == (64, 32)


def test_a_run_that_goes_on_keeps_what_it_began_with(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, lines = Checkpoint(tiny("mixtral")), Lines()

    def going_on(name: str, **settings: Any) -> Job:
        store = RunStore(tmp_path / name, {}, {}, lines.log)
        return replace(job_of(Stages(lines), calibration_tokens=1024, **settings), store=store)

    made = calibration_for(checkpoint, going_on("one", calibrate="auto"), tmp_path / "one" / "statistics")
    again = going_on("one", calibrate="auto")
    assert calibration_for(checkpoint, again, tmp_path / "one" / "statistics") == made
    stages = ("sample", "calibrate", "fisher")
    assert [(stage.name, stage.resumed) for stage in again.stages.records] == [(name, True) for name in stages]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert calibration_for(checkpoint, going_on("two", calibrate="auto"), tmp_path / "two" / "statistics") is None
    assert calibration_for(checkpoint, going_on("two", calibrate="auto"), tmp_path / "two" / "statistics") is None
    assert "weights only, as when this run began" in lines.lines[-1]
