"""Seeding methods side by side on one checkpoint, each in a process of its own; no weights are written."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from globe.checkpoint.hub import local
from globe.checkpoint.tensorfile import write_text
from globe.choice.plan import plan
from globe.choice.seeding import seed
from globe.compute import ranks
from globe.compute.devices import check_device, keep_memory, set_threads
from globe.errors import GlobeError, UsageError
from globe.fit.stages import alternate, fit_report
from globe.machine.launch import environment_alone
from globe.runs.alike import require_alike
from globe.runs.job import Job
from globe.runs.stages import Display, Stages, peak_rss_bytes
from globe.runs.store import RunStore
from globe.seeds import METHODS
from globe.seeds.pool import pool_of
from globe.seeds.proxies import scan_family
from globe.settings import Settings

_LOOPS = (0, 6)


@ranks.joined()
def compare(
    model_dir: Path | str,
    methods: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    outer_loops: Sequence[int] = _LOOPS,
    out: Path | str | None = None,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Seed and train with each method, and say what errors, seconds and memory it takes.

    A method's seeds are made once and its loops run once, up to the largest count; the error at a smaller count is that
    of the best state by then, which is what `compress` with that count would deliver. Every method runs in a process of
    its own, so that the peak memory is its own. What the runs keep on disk is in the system's temporary directory
    (TMPDIR), and removed. Under torchrun methods are dealt to the ranks; all have the result, and rank 0 writes it.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory.
    methods : sequence of str, optional
        All but ``auto`` if not given.
    settings : Settings, optional
        `method`, `outer_loops` and `time_limit` are not used.
    outer_loops : sequence of int
        The counts of loops to show.
    out : Path or str, optional
        A JSON file for the result.
    progress : Display, optional
        Shows what runs.

    Returns
    -------
    dict
        ``rows``: for every method, family and count of loops the relative error (that of the best state), the median
        support of the state after these loops, `seconds` of the loops; the same for all counts: explained variance,
        proxy error, `seed_seconds`, `chosen` (of ``auto``), and the peak resident memory of the process. A method that
        could not run has one row with its `error`. Also ``settings`` and ``source``.

    Raises
    ------
    UsageError
        If a method or a count of loops is none, or a setting does not fit the checkpoint; or ranks were given others.
    GlobeError
        If the checkpoint cannot be used.
    """
    changed: dict[str, Any] = {"solver": "alternate", "calibrate": "none", "correct": "none", "time_limit": None}
    base = replace(settings or Settings(), **changed)
    if base.ratio is not None:
        raise UsageError("methods are compared at one rank and bank size, not at a ratio; use rank and bank_size")
    known = Settings.choices("method")
    named = list(dict.fromkeys(methods)) if methods is not None else list(METHODS)
    for name in named:
        if name not in known:
            raise UsageError(f"method {name!r} is not known; expected one of {', '.join(known)}")
    counts = sorted(set(outer_loops))
    if not named or not counts or counts[0] < 0:
        raise UsageError(f"methods {named} and outer loops {counts}: expected one of each at least, no count negative")
    target, each = Path(out) if out is not None else None, {**base.as_dict(), "outer_loops": counts[-1]}
    if target is not None and not target.parent.is_dir():
        raise GlobeError(f"{target.parent}: no such directory; expected one to write {target.name} in")
    model = local(model_dir)
    with ranks.together(), ranks.alone():
        planned = plan(model, Settings(**each))
        seen = {"source": planned.checkpoint.fingerprint()}
    require_alike({"settings": each, "methods": named, "outer_loops": counts}, seen)
    stages = Stages(progress if ranks.rank() == 0 else None)
    mine: dict[str, list[dict[str, Any]]] = {}
    for name in ranks.own(named):
        with stages.stage(name, 1) as advance:
            mine[name] = _in_process(model, Settings(**{**each, "method": name}), counts)
            advance(1)
    found = {name: rows for some in ranks.gathered(mine) for name, rows in some.items()}
    rows = [row for name in named for row in found[name]]
    source = {"path": str(model_dir), "layout": planned.checkpoint.layout.name}
    result = {"rows": rows, "settings": base.as_dict(), "source": source}
    if target is not None:
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        ranks.lead(partial(write_text, target, text))
    return result


def _in_process(model: Path, settings: Settings, counts: list[int]) -> list[dict[str, Any]]:
    request = json.dumps({"model": str(model), "settings": settings.as_dict(), "counts": counts})
    done = subprocess.run(
        [sys.executable, "-m", "globe.pipeline.compare"],
        input=request,
        capture_output=True,
        text=True,
        env=environment_alone(),
    )
    if done.returncode == 0:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows
    said = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
    return [{"method": settings.method, "error": said[-1]}]


def run_one(model: Path, settings: Settings, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of one method, made in this process."""
    planned, stages = plan(model, settings), Stages()
    set_threads(settings.threads)
    keep_memory()
    check_device(planned.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="globe-compare-") as folder:
        store = RunStore(Path(folder) / "run", {}, {}, lambda line: None)
        job = Job(settings, planned.device, planned.blocks, stages, store)
        for name, stored in planned.families.items():
            scanned = scan_family(stored, job)
            pool = pool_of(scanned.usual_size(stored), planned.shapes[name], scanned, settings)
            alternate(pool, seed(pool, job), job)
            report = fit_report(pool, job)
            rows += [_row(settings.method, name, report, count) for count in counts]
            store.drop(f"{name}.fit")
    for row in rows:
        row["peak_rss_bytes"] = peak_rss_bytes()
    return rows


def _row(method: str, family: str, report: dict[str, Any], count: int) -> dict[str, Any]:
    seeds, done = report["init"], [record for record in report["history"] if record["loop"] <= count]
    return {
        "method": method,
        "family": family,
        "rank": report["rank"],
        "bank": report["bank"],
        "outer_loops": count,
        "relative_error": min([seeds["relative_error"], *(record["relative_error"] for record in done)]),
        "support_median": done[-1]["support_median"] if done else seeds["support_median"],
        "explained_variance": seeds["explained_variance"],
        "proxy_error": seeds["proxy_error"],
        "seed_seconds": seeds["seconds"],
        "seconds": sum(record["seconds"] for record in done),
        "chosen": report["seeds"]["chosen"],
    }


def _main() -> int:
    request = json.load(sys.stdin)
    try:
        rows = run_one(Path(request["model"]), Settings(**request["settings"]), request["counts"])
    except GlobeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_status
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
