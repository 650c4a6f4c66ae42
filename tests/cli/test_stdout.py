"""stdout holds one JSON object and nothing else, and no code of a checkpoint runs because stdin says y."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from checkpoints import make_tiny
from refusals import SMALL, command, in_process, refusal

CODE = """from transformers import PreTrainedTokenizerFast
print("own code ran")
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer brings its own Python."""
    source = make_tiny("qwen3_moe", tmp_path_factory.mktemp("own") / "source")
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    auto_map = {"AutoTokenizer": [None, "own_tokenizer.Own"]}
    path.write_text(json.dumps({**config, "tokenizer_class": "Own", "auto_map": auto_map}))
    (source / "own_tokenizer.py").write_text(CODE)
    return source


@pytest.mark.parametrize("name", ["calibrate", "eval"])
def test_code_of_a_tokenizer_is_refused_whatever_stdin_holds(
    name: str, own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [name, own_code, *([tmp_path / "c.safetensors"] if name == "calibrate" else []), "--json"]
    line = refusal(1, *arguments)
    assert "tokenizer_config.json" in line and "--trust-remote-code" in line
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert refusal(1, *arguments) == line


def test_a_process_runs_no_code_of_a_tokenizer_whatever_stdin_holds(own_code: Path) -> None:
    arguments = ("eval", own_code, "--json", "-q")
    done = subprocess.run(command(*arguments), input="y\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "") and "--trust-remote-code" in done.stderr
    assert "own code ran" not in done.stderr


@pytest.mark.parametrize("stdin", ["closed", "open"])
def test_every_command_prints_one_json_object(
    stdin: str, own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None if stdin == "closed" else io.StringIO("y\n" * 9))
    out, dense, trust = tmp_path / "out", tmp_path / "dense", "--trust-remote-code"
    plan = tmp_path / "plan.yaml"
    settings = {"rank": 0.5, "bank_size": 3, "outer_loops": 0, "device": "cpu", "calibrate": "none"}
    plan.write_text(json.dumps({"jobs": [{"model": str(own_code), "out": "second", "settings": settings}]}))
    (tmp_path / "text.txt").write_text("A router chooses a few experts for every token. " * 8, encoding="utf-8")
    short = ("--window", "64", "--max-tokens", "128", "--text", tmp_path / "text.txt")
    for arguments in (
        ("inspect", own_code),
        ("calibrate", own_code, tmp_path / "c.safetensors", "--tokens", "128", "--window", "64", trust),
        ("compress", own_code, out, *SMALL, trust),
        ("compare", own_code, "--methods", "ts-pca", "--outer-loops", "0", "--rank", "0.5", "--bank-size", "3"),
        ("batch", plan, trust),
        ("report", out),
        ("export", out, dense),
        ("eval", out, *short, trust),
        ("eval", dense, "--against", own_code, *short, trust),
    ):
        done = in_process(*arguments, "--json")
        assert done.returncode == 0, (arguments, done.stderr)
        assert isinstance(json.loads(done.stdout), dict), arguments


@pytest.mark.parametrize("stdin", ["<&-", "< /dev/zero"], ids=["closed", "open"])
def test_a_process_prints_one_json_object(stdin: str, own_code: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A router chooses a few experts for every token. " * 8, encoding="utf-8")
    short = ("--window", "64", "--max-tokens", "128", "--text", tmp_path / "text.txt")
    arguments = ("eval", own_code, *short, "--trust-remote-code", "--json")
    line = f"{shlex.join(command(*arguments))} {stdin}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert "own code ran" in done.stderr
