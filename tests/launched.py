"""Commands at many ranks, as torchrun starts them, in processes forked from one that has imported everything.

A rank that fails ends the others, as under torchrun, once they have had time to end by themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helper_process import HelperProcess
from killed import CALIBRATES, set_trap

_PATIENCE = 60.0  # seconds that ranks have to end after one of them has
_ADDRESS = "127.0.0.1"
_SAID = ("out", "err")


@dataclass(frozen=True)
class Ended:
    """How a rank has ended: its exit status, negative for a signal, and what it wrote."""

    status: int
    out: str
    err: str


class Launcher(HelperProcess):
    """Start commands at many ranks; use it with `with`."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def run(self, count: int, *arguments: object, **traps: Any) -> list[Ended]:
        """Run `globe ARGUMENTS` at so many ranks.

        Parameters
        ----------
        count : int
        arguments : object
            A list among them has one for every rank.
        traps : Any
            `rankN` is what `killed.set_trap` takes: a function that rank N does not survive, or which fails there.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        commands = [
            [str(each[number] if isinstance(each, list) else each) for each in arguments] for number in range(count)
        ]
        self._process.stdin.write(json.dumps({"commands": commands, "traps": traps}) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]


def _serve() -> None:
    import torch.distributed as dist

    for module in (*CALIBRATES, "globe.healing.heal", "globe.pipeline.compare", "globe.pipeline.compress"):
        importlib.import_module(module)

    for line in sys.stdin:
        order = json.loads(line)
        commands = order["commands"]
        store = dist.TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            children = {}
            for number, command in enumerate(commands):
                child = os.fork()
                if child == 0:
                    _be_rank(number, len(commands), store.port, Path(folder))
                    _run(command, order["traps"].get(f"rank{number}"))
                children[child] = number
            statuses = _wait(children)
            said = {number: [(Path(folder) / f"{number}.{kind}").read_text() for kind in _SAID] for number in statuses}
            ended = [
                {"status": statuses[number], "out": out, "err": err} for number, (out, err) in sorted(said.items())
            ]
        del store
        print(json.dumps(ended), flush=True)


def _be_rank(number: int, count: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": _ADDRESS, "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for descriptor, kind in ((0, None), (1, "out"), (2, "err")):
        place = folder / f"{number}.{kind}" if kind else Path(os.devnull)
        opened = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)


def _run(command: list[str], trap: dict[str, Any] | None) -> None:
    """Be `globe COMMAND`; never returns."""
    import traceback

    from globe.cli import main

    status: int = 1
    try:
        if trap is not None:
            set_trap(**trap)
        sys.argv = ["globe", *command]
        main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(children: dict[int, int]) -> dict[int, int]:
    """The exit status of every rank; those that are left long after one has failed are killed."""
    left, statuses, ends = dict(children), {}, None
    while left:
        child, found = os.waitpid(-1, os.WNOHANG)
        if child:
            status = os.waitstatus_to_exitcode(found)
            statuses[left.pop(child)] = status
            if status and ends is None:
                ends = time.monotonic() + _PATIENCE
            continue
        if ends is not None and time.monotonic() > ends:
            for process in left:
                os.kill(process, signal.SIGTERM)
            ends = None
        time.sleep(0.02)
    return statuses


if __name__ == "__main__":
    _serve()
