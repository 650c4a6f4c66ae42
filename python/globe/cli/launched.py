"""A command at one of many ranks: rank 0 speaks for all, and says why another has ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import click

from globe.machine.launch import launched_rank, launched_ranks

RANKED = ("compress", "calibrate", "compare", "heal")  # by many ranks together
_PATIENCE = 5.0  # seconds that a rank waits for another's last words, or for their being told
_TOLD = "globe/told"


def run_at_rank(arguments: list[str], work: Callable[[list[str]], tuple[int, str | None]]) -> int:
    """Run a command with the other ranks, and give its exit status.

    Parameters
    ----------
    arguments : list of str
    work : callable
        Given them, runs the command: its exit status, and what is to be said on stderr.
    """
    if launched_rank() != 0:
        sys.stdout = open(os.devnull, "w")
    if not arguments or arguments[0].startswith("-") or {"-h", "--help"} & set(arguments):
        return work(arguments)[0]
    if arguments[0] not in RANKED:
        if launched_rank() == 0:
            found = f"globe {arguments[0]} at {launched_ranks()} ranks"
            told = f"{found}; expected one of {', '.join(RANKED)}: all else is one process, without torchrun"
            click.echo(f"globe: error: {told}", err=True)
        return 2
    import torch.distributed as dist

    from globe.compute import ranks
    from globe.errors import GlobeError

    book: Any = None
    status: int = 1
    line: str | None = None  # where another rank is lost
    try:
        with ranks.joined():
            book = dist.distributed_c10d._get_default_store()
            try:
                commands = ranks.gathered(arguments[0])
                if len(set(commands)) > 1:
                    told = ", ".join(f"globe {command}" for command in dict.fromkeys(commands))
                    status, line = 2, f"globe: error: ranks were given {told}; start all with the same command"
                else:
                    status, line = work(arguments)
            except Exception as error:
                if not ranks.is_loss(error):
                    book.set(_key(launched_rank()), f"globe: error: {type(error).__name__}: {error}")
                    raise
            if line is not None:
                book.set(_key(launched_rank()), line)
    except GlobeError as error:  # there was nobody to join
        click.echo(f"globe: error: {error}", err=True)
        return error.exit_status
    if status != 0:
        (_tell if launched_rank() == 0 else _tell_if_untold)(book, line)
    return status


def _tell(book: Any, mine: str | None) -> None:
    """Say what rank 0 has to: its own refusal, or that of the rank whose end it has noticed."""
    line = mine or "globe: error: another rank has ended without a word; torchrun tells its exit status"
    ends = time.monotonic() + _PATIENCE
    while mine is None and time.monotonic() < ends:
        found = next((number for number in range(1, launched_ranks()) if book.check([_key(number)])), None)
        if found is not None:
            line = _named(found, book.get(_key(found)).decode())
            break
        time.sleep(0.05)
    click.echo(line, err=True)
    book.set(_TOLD, "")


def _tell_if_untold(book: Any, mine: str | None) -> None:
    """Say another rank's refusal, if rank 0 does not by and by."""
    if mine is None:
        return
    try:
        book.wait([_TOLD], timedelta(seconds=_PATIENCE))
    except RuntimeError:  # or rank 0 has gone, and with it what it kept
        click.echo(_named(launched_rank(), mine), err=True)


def _named(number: int, line: str) -> str:
    head = "globe: error: "
    named = line.removeprefix(head).startswith("rank ")
    return line if named else f"{head}rank {number}: {line.removeprefix(head)}"


def _key(number: int) -> str:
    return f"globe/{number}"
