"""The command line: inspect, calibrate, compress, report, compare, batch, export, eval, heal, push, env and demo."""

from __future__ import annotations

import sys

import click

from globe._version import __version__
from globe.cli import about, foreseeing, healing, making, using
from globe.cli.launched import run_at_rank
from globe.errors import GlobeError, UsageError
from globe.machine.launch import launched_ranks


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


for command in (
    foreseeing.inspect,
    making.calibrate,
    making.compress,
    making.batch,
    foreseeing.compare,
    making.demo,
    using.report,
    using.export,
    using.evaluate,
    healing.heal,
    using.push,
    about.env,
):
    cli.add_command(command)


def main() -> None:
    """Run the command; every refusal is one line on stderr and exit status 1 (data) or 2 (usage)."""
    arguments = sys.argv[1:] or ["--help"]
    if launched_ranks() > 1:
        sys.exit(run_at_rank(arguments, _run))
    status, line = _run(arguments)
    if line is not None:
        click.echo(line, err=True)
    sys.exit(status)


def _run(arguments: list[str]) -> tuple[int, str | None]:
    """Run the command: its exit status, and what is to be said on stderr."""
    try:
        return cli.main(arguments, prog_name="globe", standalone_mode=False) or 0, None
    except click.ClickException as error:
        return _refused(UsageError(error.format_message()))
    except GlobeError as error:
        return _refused(error)
    except (click.Abort, KeyboardInterrupt):
        return 130, "globe: stopped"
    except BrokenPipeError:
        return 141, None
    except OSError as error:
        return _refused(GlobeError(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)))


def _refused(error: GlobeError) -> tuple[int, str]:
    return error.exit_status, f"globe: error: {' '.join(str(error).split())}"
