"""Options and parameter types that commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from globe.machine.launch import launched_rank
from globe.runs.stages import Display, Silent
from globe.runs.tracking import TRACKERS
from globe.settings import Settings

_Command = TypeVar("_Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


if TYPE_CHECKING:
    _Number = click.ParamType[float | int]
    _Word = click.ParamType[str | int]
else:
    _Number = _Word = click.ParamType  # takes no parameter in click 8.1


class Rank(_Number):
    """A fraction or a count of rows."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        try:
            return int(value)
        except ValueError:
            try:
                return float(value)
            except ValueError:
                self.fail(f"{value!r} is neither a fraction such as 0.75 nor a count of rows such as 288", param, ctx)


class Scope(_Word):
    """A word or a count of layers."""

    name = "scope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        return int(value) if str(value).isdecimal() else str(value)


def choice(setting: str) -> click.Choice[str]:
    """The values of a setting."""
    return click.Choice(Settings.choices(setting))


def common(command: _Command) -> _Command:
    """Add what every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, callback=_hush, help="No progress, no tables.")(command)


def _hush(context: click.Context, option: click.Parameter, quiet: bool) -> bool:
    """Let what is fetched from the hub show no progress either; huggingface_hub reads this once, when it is needed."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


def sizing(command: _Command) -> _Command:
    """Add what commands have that choose ranks and banks."""
    for option in (
        click.option("--families", help="Any of gate, up and down.  [default: gate,up]"),
        click.option(
            "--bank-size", type=int, help="Bank size.  [default: 128 from 512 experts, 64 from 256, else N/4]"
        ),
        click.option(
            "--bank-ratio", type=float, help="Bank size as a fraction of the experts.  [default: by bank size]"
        ),
        click.option("--rank", type=Rank(), help="Fraction of min(p, d), or rows.  [default: 0.75]"),
    ):
        command = option(command)
    return command


def storing(command: _Command) -> _Command:
    """Add what commands have that choose the bits of factors."""
    group = "Values that share a scale below 16 bits, 32 to 128.  [default: 32]"
    command = click.option("--group-size", type=int, help=group)(command)
    for name, said in (
        ("--atom-bits", "Of atoms.  [default: --factor-bits]"),
        ("--left-bits", "Of left factors.  [default: --factor-bits]"),
        ("--factor-bits", "Stored bits of a factor's value.  [default: 16]"),
    ):
        command = click.option(name, type=int, metavar="16|8|4|3", help=said)(command)
    return command


def resuming(command: _Command) -> _Command:
    """Add what commands have that go on with what an earlier process did."""
    command = click.option("--keep-run", is_flag=True, help="Keep OUT/.globe-run at the end.")(command)
    return click.option("--fresh", is_flag=True, help="Start over where OUT holds an earlier run or its output.")(
        command
    )


def trusting(command: _Command) -> _Command:
    """Add what commands have that load a model or a tokenizer."""
    return click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along.")(
        command
    )


def tracking(command: _Command) -> _Command:
    """Add what commands have that leave histories."""
    return click.option("--log", "tracker", type=click.Choice(list(TRACKERS)), help="Log the histories too.")(command)


def display_for(quiet: bool) -> Display:
    """Where a command shows its stages."""
    if quiet or launched_rank() != 0:
        return Silent()
    from globe.runs.display import RichDisplay

    return RichDisplay()
