"""How much longer `globe compress` takes beside other busy processes.

python benchmarks/busy.py MODEL [--others 0,2,4] [--repeats 3] [--wait default] [--json FILE]

Every count of others is run `repeats` times, in turns; the run with the median wall time stands. Others are loops that
never wait. `--wait default` leaves OpenMP and OpenBLAS as they are without GloBE, which can take many minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

_SIZES = ("--families", "gate", "--rank", "0.75", "--bank-ratio", "0.25", "--calibrate", "none", "--quiet")
_SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200", "OPENBLAS_THREAD_TIMEOUT": "26"}  # their defaults
_CHOSEN = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", *_SPINNING)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--others", default="0,2,4", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--wait", type=click.Choice(["passive", "default"]), default="passive", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(model: Path, others: str, repeats: int, wait: str, json_file: Path | None) -> None:
    """Print wall and processor seconds for each count of other processes, and their ratios to the first."""
    counts = [int(count) for count in others.split(",")]
    runs: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            runs[count].append(beside(count, model, wait))
    rows = []
    for count in counts:
        wall, cpu = sorted(runs[count])[len(runs[count]) // 2]
        first = rows[0] if rows else {"wall": wall, "cpu": cpu}
        rows.append({"others": count, "wall": wall, "cpu": cpu, "wall_ratio": wall / first["wall"]})
        rows[-1]["cpu_ratio"] = cpu / first["cpu"]
        print(f"{count} others: {wall:.1f} s ({rows[-1]['wall_ratio']:.2f}), processor {cpu:.1f} s", flush=True)
    if json_file is not None:
        found = {"processors": os.cpu_count(), "load": os.getloadavg(), "wait": wait, "runs": runs, "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def beside(count: int, model: Path, wait: str) -> tuple[float, float]:
    """Wall and processor seconds of one run beside so many busy loops."""
    clean = {key: value for key, value in os.environ.items() if key not in _CHOSEN}
    environment = {**clean, **(_SPINNING if wait == "default" else {})}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "globe", "compress", str(model), f"{folder}/out", *_SIZES]
            start = time.perf_counter()
            child = subprocess.Popen(command, env=environment)
            _, status, used = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    if child.returncode != 0:
        raise click.ClickException(f"globe compress ended with status {child.returncode}")
    return wall, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
