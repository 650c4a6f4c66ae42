"""Commands on what `globe compress` made: report, export, eval and push."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from globe.cli.headings import Headed
from globe.cli.options import PATH, choice, common, display_for, trusting
from globe.errors import UsageError

if TYPE_CHECKING:
    from globe.evaluation.evaluate import Evaluation


@click.command()
@click.argument("out", type=PATH)
@click.argument("other", type=PATH, required=False)
@click.option("--output", type=PATH, metavar="FILE.html", help="The page.  [default: OUT/report.html]")
@common
def report(out: Path, other: Path | None, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Draw a page about OUT, or about OUT beside OTHER: errors, banks, what layers share, training, costs.

    The page needs nothing but itself, no network and no script. `globe compress` ends with it.
    """
    from globe.report import report as run

    written = run(out, other, output=output)
    if as_json:
        click.echo(json.dumps({"report": str(written)}))
    elif not quiet:
        click.echo(f"{written}: {written.stat().st_size / 1e6:,.1f} MB, open it in a browser")


@click.command()
@click.argument("out", type=PATH)
@click.argument("dense", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in a DENSE that is not empty; the rest stays.")
@click.option("--as-source", is_flag=True, help="Routed experts in fp8 again, where the source has them so.")
@click.option(
    "--gguf-type", type=click.Choice(["q4_0", "q8_0"]), help="DENSE is a GGUF file for llama.cpp, so quantised."
)
@common
def export(
    out: Path, dense: Path, overwrite: bool, as_source: bool, gguf_type: str | None, as_json: bool, quiet: bool
) -> None:
    """Write the dense checkpoint that OUT stands for, with the source's names, dtype and shards, or as GGUF."""
    from globe.artifact.export import export as run
    from globe.artifact.gguf_file import export_gguf

    display = display_for(quiet)
    if gguf_type is not None:
        if as_source:
            raise UsageError("--as-source does not go with --gguf-type")
        done = export_gguf(out, dense, gguf_type, overwrite=overwrite, progress=display)
        if done["fp16"] and not as_json and not quiet:
            click.echo(f"fp16, as 32 does not divide their rows: {', '.join(done['fp16'])}")
    else:
        done = run(out, dense, overwrite=overwrite, as_source=as_source, progress=display)
    if as_json:
        click.echo(json.dumps(done))
    elif not quiet:
        click.echo(f"{dense}: {done['tensors']} tensors, {done['bytes'] / 1e6:,.1f} MB")


@click.command("eval", cls=Headed)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--against", type=PATH, metavar="MODEL", help="Reference for KL and top-1 agreement.")
@click.option(
    "--text",
    "texts",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="UTF-8 text; several times for a row each.  [default: see above]",
)
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=int, help="Use the first N tokens of each text.")
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Tasks of lm-eval, separated by commas, instead of a text.")
@click.option("--lm-eval-path", type=PATH, metavar="FOLDER", help="YAML files of more tasks.")
@click.option("--limit", type=int, metavar="N", help="Only the first N documents of every task.")
@click.option("--device", type=choice("device"), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all that the process may use]")
@trusting
@common
def evaluate(
    directory: Path,
    against: Path | None,
    texts: tuple[Path, ...],
    window: int,
    max_tokens: int | None,
    tasks: str | None,
    lm_eval_path: Path | None,
    limit: int | None,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Token perplexity of DIR, dense or factored, on windows that do not overlap; or tasks of lm-eval.

    A factored DIR is judged --against its original on the held-out half of every text that it was calibrated on (8,192
    tokens of each), unless --text names others, and DIR/evaluation.json, from which `globe report` draws, keeps what
    was found. Where on some text it is a third worse than on the best of its calibration's kinds, that is said. In all
    other cases the text is half of Python's own help topics.
    """
    from globe.artifact.factored import is_factored
    from globe.compute.devices import pick_device, set_threads
    from globe.evaluation.evaluate import evaluate_texts, geometric_mean

    if tasks is None and (lm_eval_path is not None or limit is not None):
        raise UsageError("--lm-eval-path and --limit go with --lm-eval")
    if tasks is not None and (against is not None or texts or max_tokens is not None):
        raise UsageError("--against, --text and --max-tokens do not go with --lm-eval")
    set_threads(threads)
    where = str(pick_device(device))
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        options = {"task_path": lm_eval_path, "limit": limit, "device": where, "trust_remote_code": trust_remote_code}
        _evaluate_tasks(directory, names, options, as_json, quiet)
        return
    reading: dict[str, Any] = {"window": window, "max_tokens": max_tokens, "device": where}
    reading["trust_remote_code"] = trust_remote_code
    told: dict[str, Any] = {}
    if against is not None and is_factored(directory):
        from globe.evaluation.judge import Reading, judge

        judged = judge(directory, against, texts, Reading(**reading, note=display_for(quiet).log))
        found, told["warning"] = judged.found, judged.warning
    else:
        found = evaluate_texts(directory, texts or [None], against=against, **reading)
    mean = geometric_mean(found)
    if as_json:
        rows = [asdict(each) for each in found]
        click.echo(json.dumps({**(rows[0] if len(rows) == 1 else {}), "texts": rows, "geometric_mean": mean, **told}))
    elif not quiet:
        if len(found) == 1:
            _show_one(found[0], against)
        else:
            _show_several(found, mean)
        if told.get("warning"):
            click.echo(told["warning"])


def _show_one(found: Evaluation, against: Path | None) -> None:
    click.echo(f"perplexity {found.perplexity:.3f} on {found.tokens:,} tokens of {found.text}")
    if found.kl is not None and found.top1_agreement is not None:
        click.echo(
            f"against {against}: perplexity {found.reference_perplexity:.3f}, KL {found.kl:.4f} nats per token, "
            f"top-1 agreement {found.top1_agreement:.1%}"
        )


def _show_several(found: Sequence[Evaluation], mean: float) -> None:
    compared = found[0].reference_perplexity is not None
    table = Table(box=SIMPLE_HEAD)
    for column in ("text", "tokens", "perplexity", *(("of MODEL", "ratio", "KL", "top-1") if compared else ())):
        table.add_column(column, justify="left" if column == "text" else "right", overflow="fold")
    for each in found:
        cells = [each.text, f"{each.tokens:,}", f"{each.perplexity:.3f}"]
        if each.reference_perplexity is not None:
            cells += [f"{each.reference_perplexity:.3f}", f"{each.perplexity / each.reference_perplexity:.3f}"]
            cells += [f"{each.kl:.4f}", f"{each.top1_agreement:.1%}"]
        table.add_row(*cells)
    Console().print(table)
    click.echo(f"geometric mean of the {'ratios' if compared else 'perplexities'}: {mean:.3f}")


def _evaluate_tasks(directory: Path, names: list[str], options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    from globe.evaluation.harness import evaluate_tasks

    found = evaluate_tasks(directory, names, **options)
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        table = Table(title=str(directory), box=SIMPLE_HEAD)
        for column in ("task", "metric", "value", "± standard error"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for task, figures in found.items():
            for metric, value in figures.items():
                if not metric.partition(" ")[0].endswith("_stderr"):
                    base, _, kind = metric.partition(" ")
                    error = figures.get(f"{base}_stderr {kind}".strip())
                    shown = (f"{x:.4f}" if isinstance(x, int | float) else "" for x in (value, error))
                    table.add_row(task, metric, *shown)
        Console().print(table)


@click.command()
@click.argument("out", type=PATH)
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option("--private", is_flag=True, help="If the repository is made now, make it private.")
@click.option("--revision", metavar="BRANCH", help="Made if it is not there.  [default: main]")
@common
def push(out: Path, repo: str, private: bool, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Upload OUT, with its model card, to the Hugging Face Hub.

    The token is the hub's own: HF_TOKEN, or that of `hf auth login`.
    """
    from globe.artifact.push import push as run

    address = run(out, repo, private=private, revision=revision)
    if as_json:
        click.echo(json.dumps({"repository": repo, "commit": address}))
    elif not quiet:
        click.echo(address)
