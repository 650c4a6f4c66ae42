"""Run `globe` with input that it must refuse, and damage files in ways that it must notice."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from families import WEIGHTS_ONLY_OPTIONS
from globe.cli import main

SMALL = ("--rank", "0.5", "--bank-size", "3", "--outer-loops", "1", "--device", "cpu", *WEIGHTS_ONLY_OPTIONS)


def command(*arguments: object) -> list[str]:
    """The command line of a real process."""
    return [sys.executable, "-m", "globe", *map(str, arguments)]


def in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process; an exception that a user would see as a traceback fails the test."""
    out, err, status = io.StringIO(), io.StringIO(), None
    argv = mock.patch.object(sys, "argv", ["globe", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def refusal(status: int, *arguments: object, process: bool = False) -> str:
    """Run `globe … -q`, check that it ends with `status` and one line of error, and return that line.

    Parameters
    ----------
    status : int
        1 for data, 2 for usage.
    arguments : object
        Subcommand and arguments.
    process : bool
        Run in a process of its own.
    """
    if process:
        done = subprocess.run(command(*arguments, "-q"), capture_output=True, text=True, timeout=120)
    else:
        done = in_process(*arguments, "-q")
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    line = done.stderr.rstrip("\n")
    assert line.startswith("globe: error: ") and "Traceback" not in line
    assert done.returncode == status, line
    return line.removeprefix("globe: error: ")


def file_of(directory: Path, tensor: str) -> Path:
    """The safetensors file of a directory that holds a tensor."""
    return next(file for file in sorted(directory.glob("*.safetensors")) if tensor in load_file(file))


def edit_tensor(directory: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a tensor by a changed copy of it."""
    file = file_of(directory, tensor)
    tensors = load_file(file)
    tensors[tensor] = change(tensors[tensor].clone()).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Let `change` alter the value of a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def json_variants(value: Any, replacements: tuple[Any, ...], most: int = 40) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value with one node replaced or removed, and where; three entries of a node with over `most`."""
    text = json.dumps(value)
    for place in list(_places(value, (), most)):
        for replacement in (*replacements, _REMOVED):
            copy = json.loads(text)
            node = copy
            for key in place[:-1]:
                node = node[key]
            if replacement is _REMOVED:
                del node[place[-1]]
            else:
                node[place[-1]] = replacement
            yield f"{'/'.join(map(str, place))} = {'removed' if replacement is _REMOVED else repr(replacement)}", copy


_REMOVED = object()


def _places(value: Any, prefix: tuple[Any, ...], most: int) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys if len(keys) <= most else [keys[0], keys[len(keys) // 2], keys[-1]]:
            yield (*prefix, key)
            yield from _places(value[key], (*prefix, key), most)


def flip(path: Path, at: float) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
