"""Every kernel beside every installed peer: same data, same run, medians of interleaved repeats.

Calls that take longer than two seconds are repeated three times.

python benchmarks/peers.py [--threads T] [--json FILE] [--kernels gram-bf16,nnls] [--repeats 9]

The extra `bench` installs the peers.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SLOW_MS, SLOW_REPEATS = 2000.0, 3


@click.command()
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--kernels", help="Only these, separated by commas.")
@click.option("--repeats", type=int, default=9, show_default=True)
@click.option("--processor-time", is_flag=True, help="Count the process's own time: for machines that others use.")
def main(threads: int, json_file: Path | None, kernels: str | None, repeats: int, processor_time: bool) -> None:
    # Before NumPy is imported: presets that halve the speed of its BLAS, and everybody's threads.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch
    from peer_cases import cases

    torch.set_num_threads(threads)
    wanted = kernels.split(",") if kernels else []
    rows: list[dict[str, Any]] = []
    header = (
        f"{'kernel':13} {'case':34} {'backend':9} {'ours ms':>9} {'best ms':>9} {'ratio':>6} {'error':>8} best peer"
    )
    click.echo(header)
    for case in cases(threads, wanted):
        for row in compare(case, repeats, threads, time.process_time if processor_time else time.perf_counter):
            rows.append(row)
            click.echo(
                f"{row['kernel']:13} {row['case']:34} {row['backend']:9} {row['ours_ms']:9.3f} "
                f"{row['best_peer_ms']:9.3f} {row['ratio']:6.2f} {row['error']:8.1e} "
                f"{row['best_peer']} (error {row['best_peer_error']:.1e})"
            )
        del case  # its data, before the next is made
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compare(case: Any, repeats: int, threads: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One row for each of our backends, beside the fastest of the peers."""
    from peer_cases import OURS

    times: dict[str, list[float]] = {name: [] for name in case.calls}
    errors = {name: case.error(name, call()) for name, call in case.calls.items()}  # the warm-up
    for number in range(repeats):
        for name, call in case.calls.items():
            if number >= SLOW_REPEATS and times[name][0] > SLOW_MS:
                continue
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, share in case.share.items():
        medians[name] /= share
    copy = medians.pop("copy of the least traffic", None)
    best = min((name for name in medians if name not in OURS), key=lambda name: medians[name])
    return [
        {
            "kernel": case.kernel,
            "case": case.name,
            "threads": threads,
            "backend": backend,
            "ours_ms": medians[backend],
            "best_peer": best,
            "best_peer_ms": medians[best],
            "ratio": medians[best] / medians[backend],
            "error": errors[backend],
            "best_peer_error": errors[best],
            "peers_ms": {name: value for name, value in medians.items() if name not in OURS},
            **({"share_of_copy_bandwidth": copy / medians[backend]} if copy is not None else {}),
        }
        for backend in OURS
    ]


if __name__ == "__main__":
    main()
