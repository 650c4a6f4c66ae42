"""One method on one checkpoint, in this process: a dense checkpoint out, and what it took.

quality.py runs it as a program of its own for every method, so that the peak memory is the method's: a request as
JSON on the standard input, the row as JSON on the standard output.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import METHODS, ROUNDINGS, Bits, Layer, Task
from safetensors import safe_open
from safetensors.torch import save_file

from globe.artifact.export import export
from globe.checkpoint.companions import copy_companions
from globe.checkpoint.family import Family
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.shards import INDEX_NAME
from globe.checkpoint.tensorfile import TensorWriter, copy_chunks, read_tensor, write_text
from globe.compute.devices import set_threads
from globe.errors import GlobeError
from globe.runs.stages import peak_rss_bytes
from globe.statistics.calibration import Calibration, load_calibration

METRICS = ("weights", "inputs", "both")


@dataclass(frozen=True)
class Layers(Sequence[Layer]):
    """The layers of a family, read from the checkpoint when asked for, with their metric.

    ``weights`` is no metric. ``inputs`` is what the matrix multiplies: the layer's moment at the columns of gate and
    up, each expert's hidden moment at the rows of down, which is transposed. ``both`` adds, for gate and up, what the
    output of a row does to the expert's.
    """

    family: Family
    metric: str
    calibration: Calibration | None

    @property
    def numbers(self) -> list[int]:
        return sorted({expert.layer for expert in self.family.experts})

    def __len__(self) -> int:
        return self.family.layers

    def __getitem__(self, place: Any) -> Any:
        number = self.numbers[place]
        members = [i for i, expert in enumerate(self.family.experts) if expert.layer == number]
        weights = torch.stack([self.family.read(i).float() for i in members])
        if self.metric == "weights" or self.calibration is None:
            return Layer(weights, transposed=self.family.name == "down")
        found = self.calibration.layer(number)
        if self.family.name == "down":
            rows = found.hidden_moment if found.hidden_moment is not None else torch.diag_embed(found.hidden)
            return Layer(weights, None, rows.double(), found.share, transposed=True)
        columns = found.moment.double()
        if self.metric == "inputs":
            return Layer(weights, columns, None, found.share)
        gate = self.family.name == "gate"
        full, diagonal = (found.gate_moment, found.gate_rows) if gate else (found.up_moment, found.up_rows)
        rows = full if full is not None else torch.diag_embed(diagonal)
        return Layer(weights, columns, rows.double(), found.share)


def run_baseline(
    checkpoint: Checkpoint,
    dense: Path,
    method: str,
    metric: str,
    families: Sequence[str],
    ratio: float,
    calibration: Calibration | None,
    seconds: float | None,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Fit every family within ratio × its bytes, write the dense checkpoint, and count bytes and seconds.

    `method` is a name of the baselines, with bits behind a colon or without; whole experts take what their bits take.

    Reading the experts counts as the method's time, writing does not, and neither does tuning.
    """
    if metric != "weights" and calibration is None:
        raise GlobeError(f"{method}@{metric} needs activation statistics; give --calibration FILE")
    kind, _, told = method.partition(":")
    fit, bits = (METHODS | ROUNDINGS)[kind], Bits.parse(told) if told else None
    spool = dense.with_name(dense.name + ".spool")
    spool.mkdir()
    row: dict[str, Any] = {"stored_bytes": 0, "budget_bytes": 0, "seconds": 0.0, "tuning_seconds": 0.0, "about": {}}
    for name in families:
        family = checkpoint.family(name)
        layers = Layers(family, metric, calibration)
        budget = int(2 * ratio * len(family) * family.p * family.d)
        if len(family) % len(layers):
            raise GlobeError(f"family {name}: {len(family)} experts in {len(layers)} layers; expected as many in each")
        started = clock()
        share = seconds / len(families) if seconds is not None else None
        experts = len(family) // len(layers)
        task = Task(layers, experts, family.p, family.d, budget // len(layers), share, clock=clock, bits=bits)
        found = fit(task)
        spent = clock() - started
        for number in layers.numbers:
            started = clock()
            approximation = next(found.layers)
            spent += clock() - started
            save_file({"weights": approximation.to(family.dtype).contiguous()}, spool / f"{name}-{number}")
        tuning = found.about.pop("tuning_seconds", 0.0)
        row["seconds"] += spent - tuning
        row["tuning_seconds"] += tuning
        row["stored_bytes"] += found.stored_bytes
        row["budget_bytes"] += budget
        row["about"][name] = found.about
    row["peak_rss_bytes"] = peak_rss_bytes()
    write_dense(checkpoint, [checkpoint.family(name) for name in families], spool, dense)
    return row


def write_dense(checkpoint: Checkpoint, families: Sequence[Family], spool: Path, dense: Path) -> None:
    """The checkpoint with its experts replaced by those in `spool`: the same names, shards and dtypes."""
    dense.mkdir()
    replaced: dict[str, list[tuple[Family, int, int]]] = {}
    for family in families:
        seen: dict[int, int] = {}
        for number, expert in enumerate(family.experts):
            place = seen.setdefault(expert.layer, 0)
            seen[expert.layer] += 1
            replaced.setdefault(expert.tensor, []).append((family, number, place))
    for shard in checkpoint.shards:
        entries = {name: (info.dtype, info.shape) for name, info in shard.tensors.items()}
        with TensorWriter(dense / shard.path.name, entries, {"format": "pt"}) as writer:
            for name, info in shard.tensors.items():
                if name in replaced:
                    tensor = read_tensor(info)
                    for family, number, place in replaced[name]:
                        _replace(tensor, family, number, place, spool)
                    writer.write(name, tensor)
                else:
                    writer.write_chunks(name, copy_chunks(info))
    copy_companions(checkpoint.directory, dense)
    if checkpoint.index is not None:
        write_text(dense / INDEX_NAME, json.dumps(checkpoint.index))
    write_text(dense / "config.json", json.dumps(checkpoint.config))


def _replace(tensor: torch.Tensor, family: Family, number: int, place: int, spool: Path) -> None:
    expert = family.experts[number]
    with safe_open(spool / f"{family.name}-{expert.layer}", "pt") as file:
        found = file.get_slice("weights")[place : place + 1][0]
    found = found.mT if family.name == "down" else found
    target = tensor if expert.index is None else tensor[expert.index]
    target[expert.first_row : expert.first_row + len(found)] = found


def run_globe(
    checkpoint: Checkpoint,
    dense: Path,
    families: Sequence[str],
    options: Sequence[str],
    threads: int | None,
    clock: str,
) -> dict[str, Any]:
    """`globe compress` with `options`, in a process of its own, exported as a dense checkpoint.

    Time and peak memory are those of the stages in its metrics.json, reading and writing included; in processor time,
    the start of the program too.
    """
    out = dense.with_name(dense.name + ".globe")
    command = [sys.executable, "-m", "globe", "compress", str(checkpoint.directory), str(out), "--quiet"]
    command += ["--families", ",".join(families), *options]
    command += ["--threads", str(threads)] if threads is not None else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        raise GlobeError(said[-1])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = sum(stage["seconds"] for stage in metrics["stages"])
    cpu = (used.ru_utime + used.ru_stime) / metrics["threads"]
    export(out, dense)
    outside = metrics["bytes"]["checkpoint"] - metrics["bytes"]["touched"]
    touched = sum(len(f) * f.p * f.d for f in map(checkpoint.family, families))
    return {
        "stored_bytes": round(metrics["ratio"]["touched"] * 2 * touched),
        "file_bytes": metrics["bytes"]["stored"] - outside,
        "seconds": wall if clock == "wall" else cpu,
        "tuning_seconds": 0.0,
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in metrics["stages"]),
        "about": {
            name: {key: found.get(key) for key in ("rank", "bank", "support_median")}
            for name, found in metrics["families"].items()
        },
        "history": {name: _history(found) for name, found in metrics["families"].items()},
        "seed_seconds": {name: found["init"]["seconds"] for name, found in metrics["families"].items()},
    }


def _history(report: Mapping[str, Any]) -> list[dict[str, float]]:
    """Seconds and relative error of the loops of alternation and, after them, of the steps of the joint fit."""
    told = [{key: record[key] for key in ("seconds", "relative_error")} for record in report["history"]]
    before = 0.0
    for step in report.get("joint", {}).get("history", []):
        told.append({"seconds": step["seconds"] - before, "relative_error": step["error"]})
        before = step["seconds"]
    return told


def measure_error(
    checkpoint: Checkpoint, dense: Path, families: Sequence[str], calibration: Calibration | None
) -> dict[str, Any]:
    """Relative and weighted error of the weights as they lie in the dense checkpoint, by family and of all together."""
    from baselines.task import energy

    other, found = Checkpoint(dense), {}
    for name in families:
        sums: dict[str, float] = {"error": 0.0, "energy": 0.0, "weighted_error": 0.0, "weighted_energy": 0.0}
        theirs = Layers(other.family(name), "weights", None)
        for layer, copy in zip(Layers(checkpoint.family(name), "inputs", calibration), theirs, strict=True):
            residual = layer.weights - copy.weights
            sums["error"] += energy(residual)
            sums["energy"] += energy(layer.weights)
            if calibration is not None:
                sums["weighted_error"] += energy(residual, layer.columns, layer.rows)
                sums["weighted_energy"] += energy(layer.weights, layer.columns, layer.rows)
        found[name] = sums
    total = {key: sum(sums[key] for sums in found.values()) for key in next(iter(found.values()))}
    return {
        "dense_bytes": sum(2 * len(f) * f.p * f.d for f in map(checkpoint.family, families)),
        "relative_error": total["error"] / total["energy"],
        "weighted_error": total["weighted_error"] / total["weighted_energy"] if calibration is not None else None,
        "families": {name: _relative(sums, calibration is not None) for name, sums in found.items()},
    }


def _relative(sums: Mapping[str, float], weighted: bool) -> dict[str, float | None]:
    return {
        "relative_energy": sums["energy"],
        "weighted_energy": sums["weighted_energy"],
        "relative_error": sums["error"] / sums["energy"],
        "weighted_error": sums["weighted_error"] / sums["weighted_energy"] if weighted else None,
    }


def processor_seconds() -> float:
    """The process's processor time over its threads: what an idle machine would take."""
    return time.process_time() / torch.get_num_threads()


def _main() -> int:
    request = json.load(sys.stdin)
    set_threads(request["threads"])
    calibration = load_calibration(Path(request["calibration"])) if request["calibration"] else None
    checkpoint, dense = Checkpoint(Path(request["model"])), Path(request["dense"])
    try:
        if calibration is not None and calibration.about.get("fingerprint", "") not in ("", checkpoint.fingerprint()):
            raise GlobeError(f"calibration {calibration.path}: made of another checkpoint than {request['model']}")
        if request["options"] is not None:
            asked = (request["families"], request["options"], request["threads"], request["clock"])
            row = run_globe(checkpoint, dense, *asked)
        else:
            chosen = (request["method"], request["metric"], request["families"], request["ratio"])
            clock = time.perf_counter if request["clock"] == "wall" else processor_seconds
            row = run_baseline(checkpoint, dense, *chosen, calibration, request["seconds"], clock)
        row |= measure_error(checkpoint, dense, request["families"], calibration)
    except (GlobeError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
