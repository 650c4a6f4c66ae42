"""Tokens per second and peak memory of a factored model beside its dense source, over budgets of the cache.

python benchmarks/inference.py MODEL OUT [--dtype bfloat16] [--caches 0,half,all] [--threads 2] [--json FILE]

Every configuration runs in a process of its own, which loads the model, reads a real text of PREFILL tokens at once,
and then continues it greedily for DECODE tokens; each is repeated after one repetition that is not counted, and the
median stands: tokens per second, and per second of CPU time of all threads, which a busy machine distorts less. `half`
is half of the bytes of all mixtures. Peak memory is that of the process, loading included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("outs", metavar="OUT...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--dtype", "dtypes", default="bfloat16,float32", show_default=True)
@click.option("--caches", default="0,half,all", show_default=True)
@click.option("--prefill", default=256, show_default=True)
@click.option("--decode", default=32, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--measure", hidden=True, help="Measure one configuration, in this process.")
def main(
    model: Path,
    outs: tuple[Path, ...],
    dtypes: str,
    caches: str,
    json_file: Path | None,
    measure: str | None,
    **sizes: int,
) -> None:
    if measure is not None:
        click.echo(json.dumps(_measure(model, json.loads(measure), **sizes)))
        return
    rows = []
    columns = f"{'prefill/s':>10} {'/CPU s':>8} {'decode/s':>9} {'/CPU s':>7} {'hits':>5} {'peak MiB':>9}"
    click.echo(f"{'model':24} {'dtype':9} {'cache':>9} {columns}")
    for dtype in dtypes.split(","):
        settings: list[tuple[Path, dict[str, Any]]] = [(model, {"experts": "eager"}), (model, {"experts": None})]
        settings += [(out, {"cache": _budget(out, cache, dtype)}) for out in outs for cache in caches.split(",")]
        for directory, setting in settings:
            options = [f"--{name}={value}" for name, value in sizes.items()]
            told = json.dumps({**setting, "dtype": dtype})
            command = [sys.executable, __file__, str(directory), *options, "--measure", told]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            rows.append({"model": directory.name, "dtype": dtype, **setting, **found})
            name = directory.name + (" (eager)" if setting.get("experts") else "")
            hits = f"{found['hit_rate']:.2f}" if "hit_rate" in found else "-"
            click.echo(
                f"{name:24} {dtype:9} {setting.get('cache', '-')!s:>9} {found['prefill']:10.1f} "
                f"{found['prefill_cpu']:8.1f} {found['decode']:9.2f} {found['decode_cpu']:7.2f} {hits:>5} "
                f"{found['peak_mib']:9.0f}"
            )
    if json_file is not None:
        json_file.write_text(json.dumps({**sizes, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _budget(out: Path, cache: str, dtype: str) -> int | str:
    """The bytes of `half`."""
    if cache != "half":
        return cache if cache == "all" else int(cache)
    families = json.loads((out / "globe.json").read_text(encoding="utf-8"))["families"].values()
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
    return sum(family["experts"] * family["rank"] * family["d"] for family in families) * width // 2


def _measure(
    directory: Path, setting: dict[str, Any], prefill: int, decode: int, repeats: int, threads: int
) -> dict[str, float]:
    import torch
    import transformers

    from globe.compute.devices import set_threads
    from globe.runs.stages import peak_rss_bytes
    from globe.statistics.texts import evaluation_text

    set_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, setting["dtype"])
    if "cache" in setting:
        import globe

        model = globe.load(directory, cache=setting["cache"], dtype=dtype)
    else:
        options = {"experts_implementation": setting["experts"]} if setting["experts"] else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=False, **options
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = tokenizer(evaluation_text("evaluation")[: 16 * prefill], return_tensors="pt")["input_ids"][:, :prefill]
    spent: dict[str, list[float]] = {name: [] for name in ("prefill", "decode", "prefill_cpu", "decode_cpu")}
    before = (0, 0)
    with torch.inference_mode():
        for repetition in range(repeats + 1):
            started = time.perf_counter(), time.process_time()
            answer = model(ids, use_cache=True, logits_to_keep=1)
            middle = time.perf_counter(), time.process_time()
            for _ in range(decode):
                token = answer.logits[:, -1:].argmax(-1)
                answer = model(token, past_key_values=answer.past_key_values, use_cache=True)
            ended = time.perf_counter(), time.process_time()
            if repetition:
                for clock, kind in enumerate(("", "_cpu")):
                    spent["prefill" + kind].append(middle[clock] - started[clock])
                    spent["decode" + kind].append(ended[clock] - middle[clock])
            elif "cache" in setting:
                stats = model.globe_stats()
                before = (stats["hits"], stats["misses"])
    tokens = {"prefill": prefill, "decode": decode}
    found = {name: tokens[name.partition("_")[0]] / statistics.median(times) for name, times in spent.items()}
    found["peak_mib"] = peak_rss_bytes() / 2**20
    if "cache" in setting:
        stats = model.globe_stats()
        hits, misses = stats["hits"] - before[0], stats["misses"] - before[1]
        found["hit_rate"] = hits / max(1, hits + misses)
        found["cache_mib"] = stats["bytes"] / 2**20
    return found


if __name__ == "__main__":
    main()
