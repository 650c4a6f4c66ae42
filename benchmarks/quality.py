"""Every way to store the experts: bytes, errors, perplexity, seconds and peak memory, side by side.

python benchmarks/quality.py MODEL [--ratio 0.688] [--families gate,up] [--methods svd,svd@inputs,globe-joint@inputs]
                             [--calibration FILE] [--baseline-seconds 600] [--config FILE] [--json FILE [--keep]]
                             [--plot FILE.svg] [--front FILE.svg]

A method is NAME[:BITS][@METRIC]. NAME: svd, shared (one right subspace a layer), d2 (D²-MoE's base and deltas),
mobe-silu, mobe-tanh and mobe-none (MoBE's form, trained by Adam), globe-alternate and globe-joint keep factors, in the
bytes of every RATIO. BITS: their factors in 8, 4, 3 or 2 bits and not in bf16, in groups of 32 or as in 4g128; with
zero points 4g128z. rtn (to the nearest), gptq, hqq, quanto, torchao and llm-compressor keep whole experts in BITS,
which say how many bytes that takes (baselines/libraries.py: how to install the last four). METRIC: weights (the
default), inputs (activation-weighted, layers and rows alike: svd@inputs is SVD-LLM) and both (rows weighted as well;
for GloBE layers too, as `globe compress` does it unless told otherwise). `--methods bits` is the comparison of bytes.

GloBE runs first; MoBE's form is trained for 1, 3 and 10 times (`--times`) the seconds that GloBE took in the same
metric, never longer than `--baseline-seconds`; its tuning comes on top and is not counted. Every method runs in a
process of its own and leaves a dense checkpoint, from which errors and perplexity are taken, on the texts of
quality_texts.py: columns of each over the original's, and their geometric mean. Weighted error is that of
`inputs` for all. Needs transformers, and matplotlib for the plots: the extras `hf` and `bench`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

GLOBE = {"globe-alternate": "alternate", "globe-joint": "joint"}
METRICS = ("weights", "inputs", "both")
_INPUTS_ONLY = {"metric_rows": 0, "metric_layers": 0, "metric_shrinkage": 1e12}
_BASELINES = ("svd", "shared", "d2", "mobe-silu", "mobe-tanh", "mobe-none")
DEFAULT = ",".join(
    [f"{name}{metric}" for name in GLOBE for metric in ("", "@inputs", "@both")]
    + [f"{name}{metric}" for name in _BASELINES for metric in ("", "@inputs")]
    + ["svd@both"]
)
_WHOLE = ("rtn", "gptq", "hqq", "quanto", "torchao", "llm-compressor")
BITS = ",".join(
    [f"globe-joint{bits}@both" for bits in ("", ":8", ":4")]
    + [f"gptq:{bits}@inputs" for bits in ("8g128", "4g32", "4g128", "3g32", "3g128", "2g32", "2g128")]
    + [f"rtn:{bits}" for bits in ("8g128", "4g32", "4g128", "3g32", "2g32")]
    + [f"llm-compressor:{bits}@inputs" for bits in ("4g32", "3g32", "2g32z")]
    + ["hqq:4g64", "hqq:3g64", "hqq:2g64", "quanto:8", "quanto:4g32", "torchao:4g32", "torchao:3g32"]
    + [f"{name}{bits}@inputs" for name in ("svd", "mobe-none") for bits in ("", ":8", ":4")]
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--ratio", default="0.688", show_default=True, help="Bytes stored over bytes of the families, or several."
)
@click.option("--families", default="gate,up", show_default=True)
@click.option("--methods", default=DEFAULT, help="Separated by commas, or bits.  [default: all of bf16 factors]")
@click.option("--calibration", help="A file of globe calibrate, or none.  [default: made by globe calibrate]")
@click.option("--times", default="1,3,10", show_default=True, help="MoBE's time as multiples of GloBE's.")
@click.option("--baseline-seconds", default=600.0, show_default=True, help="No baseline is trained for longer.")
@click.option(
    "--text",
    "extra",
    multiple=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text to judge on too, prose for instance; several times.",
)
@click.option("--tokens", default=8_192, show_default=True, help="Of each text of the evaluation; 0: no evaluation.")
@click.option("--window", default=512, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
@click.option("--config", type=click.Path(path_type=Path), help="Settings of globe compress, as YAML, for its rows.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: processor seconds over threads, where others share the machine.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here, after every method.")
@click.option("--keep", is_flag=True, help="Rows that the file of --json has are not run again.")
@click.option("--plot", type=click.Path(path_type=Path), help="Error against seconds, .png or .svg.")
@click.option(
    "--front", type=click.Path(path_type=Path), help="Perplexity against bytes, .png or .svg; its table in .md."
)
def main(model: Path, json_file: Path | None, plot: Path | None, front: Path | None, **options: Any) -> None:
    if options["threads"] is not None:  # before NumPy is imported
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(options["threads"])
    from quality_report import draw, show

    rows = compare(model, json_file, **options)
    show(rows)
    if plot is not None:
        draw(rows, plot)
    if front is not None:
        from quality_front import write_front

        write_front(rows, front)


def compare(
    model: Path,
    json_file: Path | None = None,
    *,
    ratio: str,
    families: str,
    methods: str,
    keep: bool,
    calibration: str | None,
    times: str,
    baseline_seconds: float,
    extra: Sequence[Path],
    tokens: int,
    window: int,
    threads: int | None,
    config: Path | None,
    clock: str,
) -> list[dict[str, Any]]:
    """The rows of all methods; one that could not run has its `error`."""
    from quality_judge import Judge

    wanted = parse(BITS if methods == "bits" else methods)
    ratios = [float(each) for each in ratio.split(",")]
    factors = sorted(float(factor) for factor in times.split(","))
    with tempfile.TemporaryDirectory(prefix="globe-quality-") as folder:
        scratch = Path(folder)
        statistics = _calibration(model, calibration, scratch, any(metric != "weights" for _, metric in wanted))
        judge = Judge(model, judged_on(extra), window, tokens, scratch) if tokens else None
        request = {
            "model": str(model),
            "families": families.split(","),
            "calibration": str(statistics) if statistics is not None else None,
            "tokens": tokens,
            "window": window,
            "threads": threads,
            "clock": clock,
            "settings": yaml.safe_load(config.read_text(encoding="utf-8")) if config is not None else {},
        }
        rows = _kept(json_file, request) if keep and json_file is not None else []
        for method, metric in wanted:
            for part in ratios if _name(method) not in _WHOLE else [None]:
                before = [row for row in rows if row["ratio"] == part]
                for seconds in budgets(before, method, metric, factors, baseline_seconds):
                    row = {"method": method, "metric": metric, "ratio": part, "seconds_given": seconds}
                    if any(row.items() <= other.items() for other in rows if "error" not in other):
                        continue
                    asked = {"ratio": part or 1.0, "seconds": seconds, "options": None}
                    row |= _run({**request, **row, **asked}, judge, scratch)
                    rows.append(row)
                    click.echo(_line(row), err=True)
                    if json_file is not None:
                        original = {"perplexities": judge.originals} if judge is not None else None
                        found = {"request": request, "original": original, "rows": rows}
                        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


def _kept(file: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that could run, if they are of the same comparison; none where there is no file."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    for name in ("model", "families", "calibration", "tokens", "window"):
        if found["request"].get(name) != request[name]:
            told = f"{name} is {found['request'].get(name)!r} in it, {request[name]!r} is asked for"
            raise click.UsageError(f"--json {file}: {told}; name another file or leave out --keep")
    return [row for row in found["rows"] if "error" not in row]


def judged_on(extra: Sequence[Path]) -> dict[str, str]:
    """The texts of every kind that this machine has, and those given beside; what is left out is said."""
    from quality_texts import texts

    from globe.statistics.texts import read_text

    found = texts()
    for name in [name for name, text in found.items() if not text]:
        click.echo(f"not judged on {name}: not on this machine", err=True)
        del found[name]
    for path in extra:
        if path.stem in found:
            raise click.UsageError(f"text {path}: there is a text {path.stem} already; rename the file")
        found[path.stem] = read_text(path)[0]
    if not extra:
        click.echo("not judged on prose: give a text of it with --text", err=True)
    return found


def parse(methods: str) -> list[tuple[str, str]]:
    """Names with their bits, and metrics, GloBE's first: the baselines' time depends on theirs."""
    from baselines import ROUNDED, Bits

    found = []
    for word in methods.split(","):
        method, _, metric = word.strip().partition("@")
        name, colon, bits = method.partition(":")
        metric = metric or "weights"
        known = name in GLOBE or name in _BASELINES or name in _WHOLE
        if not known or metric not in METRICS:
            raise click.UsageError(
                f"method {word!r} is not known; expected NAME[:BITS] or NAME[:BITS]@METRIC, NAME one of "
                f"{', '.join((*_BASELINES, *GLOBE, *_WHOLE))}, METRIC one of {', '.join(METRICS)}"
            )
        if colon and name not in (*ROUNDED, *GLOBE, *_WHOLE):
            raise click.UsageError(f"method {word!r}: {name} has no form in fewer bits; leave out :{bits}")
        if name in _WHOLE or colon:
            try:
                Bits.parse(bits)
            except ValueError as error:
                raise click.UsageError(f"method {word!r}: {error}") from None
        found.append((method, metric))
    return sorted(dict.fromkeys(found), key=lambda pair: _name(pair[0]) not in GLOBE)


def _name(method: str) -> str:
    """A method without its bits."""
    return method.partition(":")[0]


def budgets(
    rows: Sequence[dict[str, Any]], method: str, metric: str, factors: Sequence[float], most: float
) -> list[float | None]:
    """The seconds that a method is given: None where it takes what it takes.

    Multiples of GloBE's time in the same metric, of joint rather than alternation; without a run of GloBE, the most.
    """
    if not method.startswith("mobe"):
        return [None]
    ours = [row for row in rows if _name(row["method"]) in GLOBE and "error" not in row]
    ours.sort(key=lambda row: (row["metric"] != metric, _name(row["method"]) != "globe-joint"))
    if not ours:
        return [most]
    return list(dict.fromkeys(min(factor * ours[0]["seconds"], most) for factor in factors))


def globe_options(
    method: str, metric: str, ratio: float, calibration: str | None, settings: dict[str, Any], config: Path
) -> list[str]:
    """Options of `globe compress` for a row of ours; its `settings` are written to the file `config`."""
    name, _, bits = method.partition(":")
    chosen = settings | (_INPUTS_ONLY if metric == "inputs" else {}) | _factor_bits(bits)
    config.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    calibrate = "none" if metric == "weights" else str(calibration)
    return ["--solver", GLOBE[name], "--ratio", str(ratio), "--calibrate", calibrate, "--config", str(config)]


def _factor_bits(bits: str) -> dict[str, int]:
    """Settings of `globe compress` for factors in bits; bf16 without."""
    from baselines import Bits

    found = Bits.parse(bits) if bits else None
    return {"factor_bits": found.bits, "group_size": found.group} if found is not None else {}


def _calibration(model: Path, given: str | None, scratch: Path, needed: bool) -> Path | None:
    if given == "none":
        return None
    if given is not None:
        return Path(given)
    file = scratch / "calibration.safetensors"
    command = [sys.executable, "-m", "globe", "calibrate", str(model), str(file), "--row-moments", "full"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return file
    if needed:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise click.ClickException(f"globe calibrate failed ({said}); give --calibration FILE or --calibration none")
    return None


def _run(request: dict[str, Any], judge: Any, scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        request["dense"] = str(Path(folder) / "dense")
        if _name(request["method"]) in GLOBE:
            keys = ("method", "metric", "ratio", "calibration", "settings")
            request["options"] = globe_options(*(request[key] for key in keys), scratch / "globe.yaml")
        program = [sys.executable, str(Path(__file__).with_name("quality_runs.py"))]
        done = subprocess.run(program, input=json.dumps(request), capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
            return {"error": said[-1]}
        row: dict[str, Any] = json.loads(done.stdout)
        return row | (judge.evaluate(Path(request["dense"])) if judge is not None else {})


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['method']}@{row['metric']}: {row['error']}"
    mean = row.get("geometric_mean")
    shown = f"perplexity {mean:,.3f} times the original's" if mean is not None else "not evaluated"
    return (
        f"{row['method']}@{row['metric']}: relative error {row['relative_error']:.4f}, {shown}, {row['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
