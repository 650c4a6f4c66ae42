"""Commands that say beforehand what compressions would come to, and write no weights: inspect and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from globe.cli.headings import Headed
from globe.cli.options import PATH, choice, common, display_for, sizing, storing
from globe.errors import UsageError
from globe.settings import seconds_text
from globe.settings.yaml_file import read_settings


@click.command(cls=Headed)
@click.argument("model", type=PATH)
@click.option("--families", help="Any of gate, up and down.  [default: gate,up]")
@click.option("--ratio", type=float, help="Show the ranks and bank sizes that store this much of these families.")
@storing
@click.option(
    "--estimate", is_flag=True, help="Time products for a second, and say what a compression would take here."
)
@click.option("--device", type=choice("device"), help="To estimate for.  [default: auto]")
@click.option("--max-memory", help="To estimate for.  [default: half of the machine's]")
@click.option("--threads", type=int, help="To estimate for.  [default: all that the process may use]")
@click.option("--config", type=PATH, help="Settings as YAML to estimate for; options win over it.  [default: none]")
@common
def inspect(model: Path, config: Path | None, estimate: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show what MODEL (or a name on the hub) holds and what each rank and bank size would save, from headers.

    With --estimate also how long `globe compress` with these settings would take on this machine, stage by stage, how
    much memory, and how much disk beside the output.
    """
    from globe.choice.inspect import inspect as run

    settings = read_settings(config, {key: value for key, value in options.items() if value is not None})
    found = run(model, settings, estimated=estimate)
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
    bits = found["bits"]
    told = (
        "" if bits["lefts"] == bits["atoms"] == 16 else f" (left factors {bits['lefts']} bits, atoms {bits['atoms']})"
    )
    choices = Table(title=f"stored over dense, {' and '.join(found['chosen'])} together{told}")
    for column in ("rank", "bank size", "floor r/d", "touched", "all experts", "checkpoint"):
        choices.add_column(column, justify="right")
    for row in found["choices"]:
        shown = (f"{row['ratio'][axis]:.3f}" for axis in ("touched", "experts", "checkpoint"))
        choices.add_row(str(row["rank"]), str(row["bank"]), f"{row['floor']:.3f}", *shown)
    console.print(choices)
    if estimate:
        _print_estimate(found["estimate"], console)
    for line in found["notes"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_estimate(found: dict[str, Any], console: Console) -> None:
    stages = Table(title="globe compress, here")
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    for stage in found["stages"]:
        stages.add_row(stage["name"], seconds_text(stage["seconds"]))
    stages.add_row("all", seconds_text(found["seconds"]))
    console.print(stages)
    scratch = f", {found['scratch_bytes'] / 2**30:.1f} GiB of scratch files" if found["scratch_bytes"] else ""
    rate = f"{found['device']}, {found['threads']} threads, {found['gflops']:.0f} GFLOP/s in fp32 at the moment"
    console.print(f"at most {found['peak_bytes'] / 2**30:.1f} GiB of memory{scratch}; {rate}", highlight=False)


@click.command(cls=Headed)
@click.argument("model", type=PATH)
@click.option("--methods", help="Separated by commas.  [default: all but auto]")
@sizing
@click.option("--outer-loops", default="0,6", show_default=True, help="Counts of loops to show, separated by commas.")
@click.option("--codes", type=choice("codes"), help="In the loop.  [default: entmax]")
@click.option("--device", type=click.Choice(["auto", "cpu", "mps", "cuda"]), help="[default: auto]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--threads", type=int, help="CPU threads.  [default: all that the process may use]")
@click.option("--config", type=PATH, help="Settings as YAML; options win over it.  [default: none]")
@click.option("--out", type=PATH, metavar="FILE", help="Save the result as JSON.")
@common
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
    settings = read_settings(config, {key: value for key, value in options.items() if value is not None})
    from globe.pipeline.compare import compare as run

    try:
        counts = [int(count) for count in outer_loops.split(",")]
    except ValueError:
        raise UsageError(f"--outer-loops is {outer_loops!r}; expected counts such as 0,6") from None
    chosen = [name.strip() for name in methods.split(",")] if methods is not None else None
    found = run(model, chosen, settings, outer_loops=counts, out=out, progress=display_for(quiet))
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
