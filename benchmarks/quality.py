"""Every way to store the experts in the same bytes: errors, perplexity, seconds and peak memory, side by side.

python benchmarks/quality.py MODEL [--ratio 0.688] [--families gate,up] [--methods svd,svd@inputs,globe-joint@inputs]
                             [--calibration FILE] [--baseline-seconds 600] [--config FILE] [--json FILE]
                             [--plot FILE.svg]

A method is NAME or NAME@METRIC. NAME: svd, shared (one right subspace a layer), d2 (D²-MoE's base and deltas),
mobe-silu, mobe-tanh and mobe-none (MoBE's form, trained by Adam), globe-alternate and globe-joint. METRIC: weights (the
default), inputs (activation-weighted, layers and rows alike: svd@inputs is SVD-LLM) and both (rows weighted
as well; for GloBE layers too, as `globe compress` does it unless told otherwise).

GloBE runs first; MoBE's form is trained for 1, 3 and 10 times (`--times`) the seconds that GloBE took in the same
metric, never longer than `--baseline-seconds`; its tuning comes on top and is not counted. Every method runs in a
process of its own and leaves a dense checkpoint, from which errors and perplexity are taken, on the texts of
quality_texts.py: columns of each over the original's, and their geometric mean. Weighted error is that of
`inputs` for all. Needs transformers, and matplotlib for the plot: the extras `hf` and `bench`.
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


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--ratio", default=0.688, show_default=True, help="Bytes stored over bytes of the families.")
@click.option("--families", default="gate,up", show_default=True)
@click.option("--methods", default=DEFAULT, help="Separated by commas.  [default: all]")
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
@click.option("--plot", type=click.Path(path_type=Path), help="Error against seconds, .png or .svg.")
def main(model: Path, json_file: Path | None, plot: Path | None, **options: Any) -> None:
    if options["threads"] is not None:  # before NumPy is imported
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(options["threads"])
    from quality_report import draw, show

    rows = compare(model, json_file, **options)
    show(rows)
    if plot is not None:
        draw(rows, plot)


def compare(
    model: Path,
    json_file: Path | None = None,
    *,
    ratio: float,
    families: str,
    methods: str,
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

    wanted = parse(methods)
    factors = sorted(float(factor) for factor in times.split(","))
    with tempfile.TemporaryDirectory(prefix="globe-quality-") as folder:
        scratch = Path(folder)
        statistics = _calibration(model, calibration, scratch, any(metric != "weights" for _, metric in wanted))
        judge = Judge(model, judged_on(extra), window, tokens, scratch) if tokens else None
        rows: list[dict[str, Any]] = []
        request = {
            "model": str(model),
            "families": families.split(","),
            "ratio": ratio,
            "calibration": str(statistics) if statistics is not None else None,
            "threads": threads,
            "clock": clock,
            "settings": yaml.safe_load(config.read_text(encoding="utf-8")) if config is not None else {},
        }
        for method, metric in wanted:
            for seconds in budgets(rows, method, metric, factors, baseline_seconds):
                row = {"method": method, "metric": metric, "seconds_given": seconds}
                row |= _run({**request, **row, "seconds": seconds, "options": None}, judge, scratch)
                rows.append(row)
                click.echo(_line(row), err=True)
                if json_file is not None:
                    original = {"perplexities": judge.originals} if judge is not None else None
                    found = {"request": request, "original": original, "rows": rows}
                    json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


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
    """Names and metrics, GloBE's first: the baselines' time depends on theirs."""
    found = []
    for word in methods.split(","):
        name, _, metric = word.strip().partition("@")
        metric = metric or "weights"
        known = name in GLOBE or name in _BASELINES
        if not known or metric not in METRICS:
            raise click.UsageError(
                f"method {word!r} is not known; expected NAME or NAME@METRIC, NAME one of {', '.join(_BASELINES)}, "
                f"{', '.join(GLOBE)}, METRIC one of {', '.join(METRICS)}"
            )
        found.append((name, metric))
    return sorted(dict.fromkeys(found), key=lambda pair: pair[0] not in GLOBE)


def budgets(
    rows: Sequence[dict[str, Any]], method: str, metric: str, factors: Sequence[float], most: float
) -> list[float | None]:
    """The seconds that a method is given: None where it takes what it takes.

    Multiples of GloBE's time in the same metric, of joint rather than alternation; without a run of GloBE, the most.
    """
    if not method.startswith("mobe"):
        return [None]
    ours = [row for row in rows if row["method"] in GLOBE and "error" not in row]
    ours.sort(key=lambda row: (row["metric"] != metric, row["method"] != "globe-joint"))
    if not ours:
        return [most]
    return list(dict.fromkeys(min(factor * ours[0]["seconds"], most) for factor in factors))


def globe_options(
    method: str, metric: str, ratio: float, calibration: str | None, settings: dict[str, Any], config: Path
) -> list[str]:
    """Options of `globe compress` for a row of ours; its `settings` are written to the file `config`."""
    chosen = settings | (_INPUTS_ONLY if metric == "inputs" else {})
    config.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    calibrate = "none" if metric == "weights" else str(calibration)
    return ["--solver", GLOBE[method], "--ratio", str(ratio), "--calibrate", calibrate, "--config", str(config)]


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
        if request["method"] in GLOBE:
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
