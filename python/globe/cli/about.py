"""The command on GloBE itself: env."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from globe.cli.options import common


@click.command()
@common
def env(as_json: bool, quiet: bool) -> None:
    """Show versions, instruction set, devices, processors, memory and how threads wait: what a bug report needs."""
    from globe.cli.environment import environment

    found = environment()
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        for name, value in _lines(found, ""):
            click.echo(f"{name}: {value}")


def _lines(values: dict[str, Any], before: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{before}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{before}{key}", "none" if shown in (None, "") else str(shown)
