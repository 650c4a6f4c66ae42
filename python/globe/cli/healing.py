"""The command heal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from globe.cli.headings import Headed
from globe.cli.options import PATH, choice, common, display_for, trusting
from globe.healing.options import PRECISIONS


@click.command(cls=Headed)
@click.argument("out", type=PATH)
@click.option("--against", type=PATH, metavar="MODEL", required=True, help="The checkpoint that was compressed.")
@click.option("--text", type=PATH, metavar="FILE", multiple=True, help="UTF-8 texts.  [default: what Python carries]")
@click.option("--own-tokens", type=int, default=16384, show_default=True, help="Tokens that MODEL samples itself.")
@click.option("--text-tokens", type=int, default=24576, show_default=True, help="Most tokens of each text.")
@click.option("--minutes", type=float, default=20.0, show_default=True, help="How long it may take.")
@click.option("--steps", type=int, help="Take N steps instead, whatever they take: the result is then the same again.")
@click.option("--parts", default="lefts,norms", show_default=True, help="What moves: lefts, norms, dense down.")
@click.option("--rate", type=float, default=2e-4, show_default=True, help="Learning rate over a tensor's RMS.")
@click.option("--batch", type=int, default=2, show_default=True, help="Windows in a step.")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=choice("device"), default="cpu", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="Of the products.")
@click.option("--layers-at-a-time", type=int, help="Groups of N layers take turns, for less memory.  [default: all]")
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all that the process may use]")
@click.option("--fresh", is_flag=True, help="Forget a healing that was stopped.")
@trusting
@common
def heal(
    out: Path,
    against: Path,
    device: str,
    threads: int | None,
    fresh: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **told: Any,
) -> None:
    """Let OUT learn from MODEL: KL of the logits, on texts and on what MODEL itself says.

    OUT is replaced at the end, and only if it became better on text that was held out. A run that is stopped goes on
    when the same command is given again.
    """
    from globe.compute.devices import pick_device, set_threads
    from globe.healing.heal import heal as run
    from globe.healing.options import Healing

    parts = tuple(part.strip() for part in told.pop("parts").split(",") if part.strip())
    options = Healing(parts=parts, **told)
    set_threads(threads)
    how: dict[str, Any] = {"device": str(pick_device(device)), "trust_remote_code": trust_remote_code, "fresh": fresh}
    found = run(out, against, options, **how, progress=display_for(quiet))
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        for label, before in found["before"].items():
            after, original = found["after"][label], found["original"][label]
            told_after = "not finite" if after is None else f"{after:.3f}"
            click.echo(f"{label}: perplexity {before:.3f} before, {told_after} after, {original:.3f} of the original")
        if found["kept"] == "start":
            click.echo(f"{out}: no better than before on held-out text; left as it was (try a smaller --rate)")
        else:
            click.echo(f"{out}: healed, {found['steps']:,} steps, {found['tokens']:,} tokens")
