"""Many ranks make what one process makes, refuse as one, and go on together after one of them has ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints  # noqa: E402
from checkpoints import make_tiny  # noqa: E402
from globe.artifact.factored import INDEX_FILE  # noqa: E402
from launched import Ended, Launcher  # noqa: E402
from refusals import in_process  # noqa: E402
from trips import digests  # noqa: E402

RUN = ("--support", "2", "--device", "cpu", "--threads", "1", "-q")
COMMON = ("--rank", "0.5", "--bank-size", "4", *RUN)
WEIGHTS = ("--calibrate", "none")
JOINT = (*WEIGHTS, "--joint-steps", "3")
LOOPS = (*WEIGHTS, "--solver", "alternate", "--outer-loops", "2")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


def metrics(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def finished(ended: list[Ended]) -> None:
    assert [(each.status, each.err) for each in ended] == [(0, "")] * len(ended)


def refusal(ended: list[Ended], status: int) -> str:
    """The one line that all ranks have to say, which rank 0 says."""
    assert [each.status for each in ended] == [status] * len(ended), ended
    assert [each.err for each in ended[1:]] == [""] * (len(ended) - 1)
    assert ended[0].err.count("\n") == 1 and ended[0].out == ""
    return ended[0].err


CASES = {
    "joint": (2, JOINT),
    "exact": (2, (*LOOPS, "--method", "ts-pca", "--scope", "layer")),
    "aligned": (2, (*LOOPS, "--mod", "aligned", "--method", "left-gram")),
    "bits": (2, (*WEIGHTS, "--joint-steps", "2", "--rank", "32", "--factor-bits", "4")),
    "bits of one atom": (2, (*WEIGHTS, "--joint-steps", "1", "--rank", "32", "--bank-size", "1", "--factor-bits", "4")),
}
MORE = {
    "fixed": (2, (*LOOPS, "--mod", "fixed", "--method", "aligned-pca", "--share-families")),
    "rpca": (2, (*LOOPS, "--outer-loops", "0", "--method", "rpca", "--families", "down")),
    "auto": (2, (*LOOPS, "--method", "auto", "--codes", "nnls")),
    "ratio": (2, (*WEIGHTS, "--ratio", "0.6", "--joint-steps", "2")),
    "signed": (2, (*JOINT, "--codes", "signed")),
    "limit": (2, (*JOINT, "--time-limit", "10h")),
}


def as_one_process(case: tuple[int, tuple[str, ...]], ranks: Launcher, source: Path, folder: Path) -> None:
    """Compress with one process and with many ranks, and compare."""
    count, options = case
    options = (*(RUN if "--ratio" in options else COMMON), *options)
    one, many = folder / "one", folder / "many"
    done = in_process("compress", source, one, *options)
    assert done.returncode == 0, done.stderr
    finished(ranks.run(count, "compress", source, many, *options))
    wanted, found = metrics(one), metrics(many)
    assert found["ranks"] == count
    for name, family in wanted["families"].items():
        for kind in ("relative_error", "weighted_error"):
            assert family[kind] is None or found["families"][name][kind] == pytest.approx(family[kind], rel=1e-3)
    assert json.loads((many / INDEX_FILE).read_text()) == json.loads((one / INDEX_FILE).read_text())
    assert {path.name for path in many.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case: str, ranks: Launcher, source: Path, tmp_path: Path) -> None:
    as_one_process(CASES[case], ranks, source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_as_one_process_all(case: str, ranks: Launcher, source: Path, tmp_path: Path) -> None:
    as_one_process(MORE[case], ranks, source, tmp_path)


@pytest.mark.slow
def test_four_ranks(ranks: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the metric of a calibration, with corrections; four ranks of four layers.

    In fp32: rounding to bf16 inside conjugate gradients makes 1e-3 of a difference here after two steps, at any number.
    """
    calibration = ("--calibrate", "pydoc", "--calibration-tokens", "512", "--correct", "down")
    options = (*calibration, "--joint-steps", "2", "--precision", "fp32")
    monkeypatch.setitem(checkpoints._COMMON, "num_hidden_layers", 4)
    source = make_tiny("olmoe", tmp_path / "source", shards=3)
    as_one_process((4, options), ranks, source, tmp_path)


@pytest.mark.slow
def test_loops_in_the_metric(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    options = ("--calibrate", "pydoc", "--calibration-tokens", "512", "--solver", "alternate", "--outer-loops", "2")
    as_one_process((2, options), ranks, source, tmp_path)


def test_bit_equal_after_a_rank_has_ended_and_with_a_slow_one(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    finished(ranks.run(2, "compress", source, first, *COMMON, *JOINT))
    trap = {"place": "globe.compute.ranks:summed", "call": 40, "entered": True}
    ended = ranks.run(2, "compress", source, second, *COMMON, *JOINT, rank1=trap)
    assert ended[1].status == -9 and ended[0].status == 1
    assert "another rank has ended" in ended[0].err
    slow = {"place": "globe.compute.ranks:summed", "call": 3, "slow": 2.0}
    finished(ranks.run(2, "compress", source, second, *COMMON, *JOINT, rank0=slow))
    assert digests(first) == digests(second)


@pytest.mark.slow
def test_killed_anywhere(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    """Ten times, at random ranks and places: nothing is lost, and the weight files are the same to the bit."""
    whole, out, random = tmp_path / "whole", tmp_path / "out", np.random.default_rng(0)
    finished(ranks.run(2, "compress", source, whole, *COMMON, *JOINT))
    killed = 0
    for _ in range(10):
        places = ("globe.compute.ranks:summed", "globe.compute.ranks:lead", "globe.runs.store:RunStore.save")
        place, call = str(random.choice(places)), int(random.integers(1, 60))
        trap = {"place": place, "call": call, "entered": bool(random.integers(2))}
        number = 0 if "store" in place else int(random.integers(2))
        ended = ranks.run(2, "compress", source, out, *COMMON, *JOINT, **{f"rank{number}": trap})
        if ended[number].status == -9:
            killed += 1
            assert ended[1 - number].status != 0
            continue
        finished(ended)
        assert digests(out) == digests(whole)
        shutil.rmtree(out)
    assert killed > 3
    finished(ranks.run(2, "compress", source, out, *COMMON, *JOINT))
    assert digests(out) == digests(whole)


TRAPPED = """
import os
import globe.pipeline.compress
from globe.cli import main
from killed import set_trap
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    set_trap("globe.compute.ranks:summed", call=40, entered=True)
main()
"""


@pytest.mark.slow
def test_torchruns_own_restarts(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    """A rank is killed in the first life of the group; torchrun starts all again, which go on to the same bits."""
    whole, out, script = tmp_path / "whole", tmp_path / "out", tmp_path / "trapped.py"
    finished(ranks.run(2, "compress", source, whole, *COMMON, *JOINT))
    script.write_text(TRAPPED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", script, "compress", source, out, *COMMON, *JOINT],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr
    assert digests(out) == digests(whole)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces that see each other alone: their names, interfaces and addresses."""
    made = [
        (f"globe{os.getpid()}{side}", f"gv{os.getpid()}{side}", f"10.77.0.{place}")
        for place, side in ((1, "a"), (2, "b"))
    ]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", made[0][0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        subprocess.run(["ip", "netns", "add", made[1][0]], check=True)
        ends = [(interface, "netns", name) for name, interface, _ in made]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for name, interface, address in made:
            for command in (f"addr add {address}/24 dev {interface}", f"link set {interface} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield made
    finally:
        for name, _, _ in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_between_two_hosts(hosts: list[tuple[str, str, str]], ranks: Launcher, source: Path, tmp_path: Path) -> None:
    """A rank in each of two network namespaces, as two machines would be: the bits of two ranks of one machine."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(ranks.run(2, "compress", source, whole, *COMMON, *JOINT))
    started = []
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0][2], "--master-port", "29517")
    for place, (name, interface, _) in enumerate(hosts):
        torchrun = (sys.executable, "-m", "torch.distributed.run", *meeting, "--node-rank", str(place), "-m", "globe")
        command = ("ip", "netns", "exec", name, *torchrun, "compress", source, out, *COMMON, *JOINT)
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    told = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert digests(out) == digests(whole)


@pytest.mark.slow
def test_torchrun_itself(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "globe")
    done = subprocess.run(
        [*torchrun, "compress", str(source), str(out), *COMMON, *JOINT, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2
    done = subprocess.run(
        [*torchrun, "compress", str(source), str(out), *COMMON, *JOINT, "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.count("globe: error:") == 1 and "settings.seed" in done.stderr


def test_refusals(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    other = make_tiny("olmoe", tmp_path / "other", shards=2, seed=1)
    out = tmp_path / "out"
    line = refusal(ranks.run(2, "compress", [source, other], out, *COMMON, *JOINT), 1)
    assert "rank 1 is not as rank 0: source.fingerprint" in line
    line = refusal(ranks.run(2, "compress", [source, tmp_path / "nowhere"], out, *COMMON, *JOINT), 1)
    assert "rank 1: " in line and "nowhere" in line
    line = refusal(ranks.run(2, "compress", source, out, *COMMON, *JOINT, "--seed", ["0", "7"]), 2)
    assert "rank 1 is not as rank 0: settings.seed (found 7, expected 0)" in line
    line = refusal(ranks.run(3, "compress", source, out, *COMMON, *JOINT), 2)
    assert "3 ranks for 2 layers" in line
    assert "bank_size is -1" in refusal(ranks.run(2, "compress", source, out, *COMMON, *JOINT, "--bank-size", "-1"), 2)
    assert "one process" in refusal(ranks.run(2, "export", source, out), 2)
    line = refusal(ranks.run(2, "compress", source, out, *COMMON, *JOINT, ["-q", "--fresh"]), 2)
    assert "rank 1 is not as rank 0: fresh (found true, expected false)" in line
    line = refusal(ranks.run(2, ["compress", "calibrate"], source, out), 2)
    assert "ranks were given globe compress, globe calibrate" in line
    assert not out.exists()
    line = refusal(ranks.run(2, "calibrate", [source, other], out, "-q"), 1)
    assert "rank 1 is not as rank 0: source (found" in line
    line = refusal(ranks.run(2, "calibrate", source, out, "-q", "--tokens", ["512", "1024"]), 2)
    assert "rank 1 is not as rank 0: tokens (found 1024, expected 512)" in line
    assert not out.exists()
    denied = {"place": "tempfile:TemporaryFile", "denied": True}
    line = refusal(ranks.run(2, "compress", source, out, *COMMON, *JOINT, rank1=denied), 1)
    assert "rank 1: " in line and "cannot be written (Permission denied)" in line
    assert not out.exists()


def test_a_rank_ends_while_it_calibrates(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    trap = {"place": "globe.compute.ranks:summed", "call": 3, "entered": True}
    options = ("--text", "pydoc", "--tokens", "2048", "-q")
    ended = ranks.run(2, "calibrate", source, tmp_path / "calibration.safetensors", *options, rank1=trap)
    assert ended[1].status == -9 and ended[0].status == 1
    assert "another rank has ended" in ended[0].err and ended[0].err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_number_of_ranks(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trap = {"place": "globe.compute.ranks:summed", "call": 40, "entered": True}
    ended = ranks.run(2, "compress", source, out, *COMMON, *JOINT, rank0=trap)
    assert ended[0].status == -9 and ended[1].status == 1
    done = in_process("compress", source, out, *COMMON, *JOINT)
    assert done.returncode == 2 and "ranks (found 2" in done.stderr and "--fresh" in done.stderr
    done = in_process("compress", source, out, *COMMON, *JOINT, "--fresh")
    assert done.returncode == 0
    shutil.rmtree(out)


def test_methods_are_dealt(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    options = (
        "--methods",
        "ts-pca,kmeans",
        "--families",
        "gate",
        "--rank",
        "0.5",
        "--bank-size",
        "4",
        "--outer-loops",
        "0,1",
        "--threads",
        "1",
        "--json",
        "-q",
    )
    ended = ranks.run(2, "compare", source, "--out", tmp_path / "two.json", *options)
    finished(ended)
    assert ended[1].out == "" and json.loads(ended[0].out) == json.loads((tmp_path / "two.json").read_text())
    one = ranks.run(1, "compare", source, *options)
    finished(one)

    def settled(told: str) -> list[dict[str, Any]]:
        timed = ("seconds", "seed_seconds", "peak_rss_bytes")
        return [{key: value for key, value in row.items() if key not in timed} for row in json.loads(told)["rows"]]

    assert settled(ended[0].out) == settled(one[0].out)
    assert [row["method"] for row in settled(ended[0].out)][::2] == ["ts-pca", "kmeans"]
    line = refusal(ranks.run(2, "compare", source, "--methods", ["ts-pca", "kmeans"], "-q"), 2)
    assert "rank 1 is not as rank 0: methods (found" in line


def test_windows_of_a_healing_are_dealt(ranks: Launcher, source: Path, tmp_path: Path) -> None:
    finished(ranks.run(1, "compress", source, tmp_path / "one", *COMMON, *JOINT))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} times {number} is {number * number}." for number in range(400)))
    options = ("--text", text, "--own-tokens", "0", "--steps", "3", "--window", "32", "--rate", "1e-3")
    options = (*options, "--precision", "fp32", "--device", "cpu", "--threads", "1", "--json", "-q")
    told = {}
    for count, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        ended = ranks.run(count, "heal", out, "--against", source, *options)
        finished(ended)
        told[count] = json.loads(ended[0].out)
    assert told[1]["kept"] == told[2]["kept"] and told[1]["kl"][0] != told[1]["kl"][1]
    assert told[2]["kl"] == pytest.approx(told[1]["kl"], rel=1e-3)
    assert told[2]["after"] == pytest.approx(told[1]["after"], rel=1e-3)
    other = make_tiny("olmoe", tmp_path / "other", shards=2, seed=1)
    line = refusal(ranks.run(2, "heal", tmp_path / "two", "--against", [source, other], *options), 1)
    assert "rank 1 is not as rank 0: source (found" in line
    line = refusal(ranks.run(2, "heal", tmp_path / "two", "--against", source, *options, "--seed", ["0", "1"]), 2)
    assert "rank 1 is not as rank 0: seed (found 1, expected 0)" in line
    three = ranks.run(3, "heal", tmp_path / "two", "--against", source, *options)
    assert "batch is 2 at 3 ranks" in refusal(three, 2)
