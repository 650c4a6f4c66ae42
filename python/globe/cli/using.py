"""Commands on what `globe compress` made: report, export, eval and push."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from globe.cli.headings import Headed
from globe.cli.options import PATH, choice, common, display_for, trusting
from globe.errors import UsageError


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
@common
def export(out: Path, dense: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write the dense checkpoint that OUT stands for, with the source's names, dtype and shards."""
    from globe.artifact.export import export as run

    done = run(out, dense, overwrite=overwrite, progress=display_for(quiet))
    if as_json:
        click.echo(json.dumps(done))
    elif not quiet:
        click.echo(f"{dense}: {done['tensors']} tensors, {done['bytes'] / 1e6:,.1f} MB")


@click.command("eval", cls=Headed)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--against", type=PATH, metavar="MODEL", help="Reference for KL and top-1 agreement.")
@click.option("--text", type=PATH, metavar="FILE", help="UTF-8 text.  [default: half of Python's own help topics]")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=int, help="Use the first N tokens of the text.")
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
    text: Path | None,
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
    """Token perplexity of DIR, dense or factored, on windows that do not overlap; or tasks of lm-eval."""
    from globe.compute.devices import pick_device, set_threads
    from globe.evaluation.evaluate import evaluate as run

    if tasks is None and (lm_eval_path is not None or limit is not None):
        raise UsageError("--lm-eval-path and --limit go with --lm-eval")
    if tasks is not None and (against is not None or text is not None or max_tokens is not None):
        raise UsageError("--against, --text and --max-tokens do not go with --lm-eval")
    set_threads(threads)
    where = str(pick_device(device))
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        options = {"task_path": lm_eval_path, "limit": limit, "device": where, "trust_remote_code": trust_remote_code}
        _evaluate_tasks(directory, names, options, as_json, quiet)
        return
    reading: dict[str, Any] = {"text": text, "window": window, "max_tokens": max_tokens}
    found = run(directory, against=against, **reading, device=where, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    elif not quiet:
        click.echo(f"perplexity {found.perplexity:.3f} on {found.tokens:,} tokens of {found.text}")
        if found.kl is not None and found.top1_agreement is not None:
            click.echo(
                f"against {against}: perplexity {found.reference_perplexity:.3f}, KL {found.kl:.4f} nats per token, "
                f"top-1 agreement {found.top1_agreement:.1%}"
            )


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
