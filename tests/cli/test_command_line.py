"""The command line's helps, `globe env`, and the files that a stranger looks for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import globe
from globe.cli import cli
from globe.cli.environment import PACKAGES
from globe.cli.headings import HEADINGS, Headed, heading
from globe.settings import Settings

ROOT = Path(__file__).parents[2]
COMPRESS = cli.commands["compress"]


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def options(text: str) -> set[str]:
    return set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text, re.MULTILINE))


def test_help_shows_ten_options_and_where_the_rest_is() -> None:
    short, everything = said("compress", "--help"), said("compress", "--help-all")
    assert options(short) == {
        "--help", "--help-all",
        "--rank", "--bank-ratio", "--ratio", "--families", "--method", "--calibrate", "--device", "--max-memory",
        "--time-limit", "--config",
    }  # fmt: skip
    assert "`globe compress --help-all` shows all options" in " ".join(short.replace("cli", "globe").split())
    declared = {opt for param in COMPRESS.params for opt in param.opts if isinstance(param, click.Option)}
    assert options(everything) == {opt for opt in declared if opt.startswith("--")} | {"--help"}


@pytest.mark.parametrize("name", ["compress", "batch", "compare", "calibrate", "inspect", "eval", "heal"])
def test_options_stand_under_their_heading(name: str) -> None:
    text = said(name, "--help-all" if name == "compress" else "--help")
    command = cli.commands[name]
    assert isinstance(command, Headed)
    titles = [title for title in HEADINGS if re.search(rf"^{title}:$", text, re.MULTILINE)]
    parts = re.split(rf"^(?:{'|'.join(titles)}):$", text, flags=re.MULTILINE)[1:]
    under = {title: options(part) for title, part in zip(titles, parts, strict=True)}
    assert "  DIR\n" not in text and "  MODEL\n" not in text
    for param in command.params:
        if isinstance(param, click.Option):
            assert next(opt for opt in param.opts if opt.startswith("--")) in under[heading(param.name or "")]


def test_helps_show_the_defaults_of_the_settings() -> None:
    for param in COMPRESS.params:
        default = {field.name: field.default for field in dataclasses.fields(Settings)}.get(param.name or "", ...)
        if default is not ... and isinstance(param, click.Option):
            shown = re.search(r"\[default: (.*)\]", param.help or "")
            assert shown, param.name
            if isinstance(default, str | int | float) and not isinstance(default, bool):
                assert shown[1] == str(default), param.name


def test_env_says_what_a_bug_report_needs() -> None:
    command = [sys.executable, "-m", "globe", "env"]
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    found = json.loads(subprocess.run([*command, "--json"], env=clean, capture_output=True, check=True).stdout)
    assert found["globe"] == globe.__version__ and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found["packages"]) == set(PACKAGES) and found["packages"]["torch"]
    assert found["native"]["isa"] in found["native"]["isas"]
    assert 1 <= found["processors"]["usable"] <= found["processors"]["affinity"]
    assert 0 < found["memory"]["available"] and 0 < found["memory"]["total"]
    assert found["waiting"]["policy"] == "passive" and found["waiting"]["set_by"] == "globe"
    plain = subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout
    assert f"globe: {globe.__version__}\n" in plain and f"packages.torch: {found['packages']['torch']}\n" in plain


def test_the_version_is_one_everywhere() -> None:
    assert said("--version").split()[-1] == globe.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (globe.__version__, "Apache-2.0")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "mypy", "clang-format"}
