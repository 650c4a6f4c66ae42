"""Help of commands with many options: under headings, and the ten that people use first."""

from __future__ import annotations

from typing import Any

import click

# Options stand under the heading that names them; those that no heading names, under the last.
HEADINGS = {
    "What to compress": ("families", "scope", "share_families"),
    "Size": ("rank", "ratio", "bank_ratio", "bank_size", "factor_bits", "left_bits", "atom_bits", "group_size"),
    "Seeds": ("method", "methods", "seed"),
    "Fit": ("solver", "mod", "outer_loops", "init_codes", "codes", "support", "joint_steps", "correct"),
    "Metric": (
        "calibrate", "calibration_tokens", "text", "texts", "tokens", "window", "max_tokens", "row_moments", "fisher",
        "against", "tasks", "lm_eval_path", "limit", "own_tokens", "text_tokens",
    ),
    "Machine": ("device", "precision", "max_memory", "time_limit", "threads", "trust_remote_code"),
    "Run": (),
}  # fmt: skip


def heading(option: str) -> str:
    """The heading of an option, by the name of its parameter."""
    return next((title for title, names in HEADINGS.items() if option in names), "Run")


class Headed(click.Command):
    """A command whose help has headings.

    Parameters
    ----------
    shown : tuple of str, optional
        Parameters of the options that `--help` shows; `--help-all` then shows the rest too.
    """

    def __init__(self, *args: Any, shown: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shown = shown
        if shown:
            self.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=self._help_all,
                    help="Show all options and exit.",
                )
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        everything = not self.shown or bool(ctx.meta.get("globe.help_all"))
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in HEADINGS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            helps = "--help" in param.opts or param.name == "help_all"
            if record is not None and (everything or helps or param.name in self.shown):
                records[heading(param.name or "")].append(record)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if not everything:
            formatter.write_paragraph()
            formatter.write_text(f"`{ctx.command_path} --help-all` shows all options.")

    @staticmethod
    def _help_all(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            ctx.meta["globe.help_all"] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
