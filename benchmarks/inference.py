"""Tokens per second and peak memory of a factored model beside its dense source, over budgets of the cache.

python benchmarks/inference.py MODEL OUT [--dtype bfloat16] [--caches 0,half,all] [--threads 2] [--json FILE]
    [--offload] [--memory 6GiB]

Every configuration runs in a process of its own, which loads the model, reads a real text of PREFILL tokens at once,
and then continues it greedily for DECODE tokens; each is repeated after one repetition that is not counted, and the
median stands: tokens per second, and per second of CPU time of all threads, which a busy machine distorts less. `half`
is half of the bytes of all mixtures. Peak memory is that of the process, loading included.

With --offload the dense model is there with its experts on accelerate's disk too, and the factored one with those in
its files (`globe.load(offload="disk")`); with --memory every process has so much, the pages of files that it has read
included, in a scope of systemd. Bytes read are those from storage (/proc/self/io of Linux), over the tokens that were
decoded.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
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
@click.option("--offload", is_flag=True, help="Measure with experts on disk too.")
@click.option("--memory", help="What each process may use, such as 6GiB.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--measure", hidden=True, help="Measure one configuration, in this process.")
def main(
    model: Path,
    outs: tuple[Path, ...],
    dtypes: str,
    caches: str,
    offload: bool,
    memory: str | None,
    json_file: Path | None,
    measure: str | None,
    **sizes: int,
) -> None:
    if measure is not None:
        click.echo(json.dumps(_measure(model, json.loads(measure), **sizes)))
        return
    rows = []
    limited = _limited(memory)
    columns = f"{'prefill/s':>10} {'/CPU s':>8} {'decode/s':>9} {'/CPU s':>7} {'hits':>5} {'peak MiB':>9}"
    click.echo(f"{'model':24} {'dtype':9} {'cache':>9} {columns} {'read/token':>11}")
    for dtype in dtypes.split(","):
        settings: list[tuple[Path, dict[str, Any]]] = [(model, {"experts": "eager"}), (model, {"experts": None})]
        settings += [(out, {"cache": _budget(out, cache, dtype)}) for out in outs for cache in caches.split(",")]
        if offload:
            settings += [
                (place, {**each, "offload": "disk"}) for place, each in settings if each.get("experts") is None
            ]
        for directory, setting in settings:
            options = [f"--{name}={value}" for name, value in sizes.items()]
            told = json.dumps({**setting, "dtype": dtype})
            command = [*limited, sys.executable, __file__, str(directory), *options, "--measure", told]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            rows.append({"model": directory.name, "dtype": dtype, **setting, **found})
            name = directory.name + (" (eager)" if setting.get("experts") else "")
            name += " (disk)" if "offload" in setting else ""
            hits = f"{found['hit_rate']:.2f}" if "hit_rate" in found else "-"
            click.echo(
                f"{name:24} {dtype:9} {setting.get('cache', '-')!s:>9} {found['prefill']:10.1f} "
                f"{found['prefill_cpu']:8.1f} {found['decode']:9.2f} {found['decode_cpu']:7.2f} {hits:>5} "
                f"{found['peak_mib']:9.0f} {found['read_per_token']:11.0f}"
            )
    if json_file is not None:
        json_file.write_text(json.dumps({**sizes, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _limited(memory: str | None) -> list[str]:
    """What starts a process that has so much memory, and no swap."""
    if memory is None:
        return []
    from globe.settings import parse_bytes

    if shutil.which("systemd-run") is None or not Path("/run/systemd/system").is_dir():
        raise click.UsageError("--memory needs systemd; leave it out, and limit the whole (docker run --memory …)")
    limits = ["-p", f"MemoryMax={parse_bytes(memory)}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", "--quiet", "--scope", *(["--user"] if os.getuid() else []), *limits]


def _bytes_read() -> int:
    """What this process has had read from storage so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _dense(directory: Path, setting: dict[str, Any], dtype: Any) -> Any:
    """The dense model, with its experts on disk where it is to be so."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if setting["experts"]:
        options["experts_implementation"] = setting["experts"]
    if "offload" in setting:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config)
        named = [*empty.named_parameters(remove_duplicate=False), *empty.named_buffers(remove_duplicate=False)]
        places = {name.rpartition(".")[0]: "cpu" for name, _ in named if ".experts." not in name}
        places |= {name: "disk" for name, _ in empty.named_modules() if name.endswith(".experts")}
        folder = tempfile.mkdtemp(prefix="globe-inference-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        options |= {"device_map": places, "offload_folder": folder}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


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

        model = globe.load(directory, cache=setting["cache"], dtype=dtype, offload=setting.get("offload"))
    else:
        model = _dense(directory, setting, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = tokenizer(evaluation_text("evaluation")[: 16 * prefill], return_tensors="pt")["input_ids"][:, :prefill]
    spent: dict[str, list[float]] = {name: [] for name in ("prefill", "decode", "prefill_cpu", "decode_cpu")}
    before, read, tokens = (0, 0), 0, {"prefill": prefill, "decode": decode}
    with torch.inference_mode():
        for repetition in range(repeats + 1):
            started = time.perf_counter(), time.process_time()
            answer = model(ids, use_cache=True, logits_to_keep=1)
            middle, held = (time.perf_counter(), time.process_time()), _bytes_read()
            for _ in range(decode):
                token = answer.logits[:, -1:].argmax(-1)
                answer = model(token, past_key_values=answer.past_key_values, use_cache=True)
            ended = time.perf_counter(), time.process_time()
            if repetition:
                read += _bytes_read() - held
                for clock, kind in enumerate(("", "_cpu")):
                    spent["prefill" + kind].append(middle[clock] - started[clock])
                    spent["decode" + kind].append(ended[clock] - middle[clock])
            elif "cache" in setting:
                stats = model.globe_stats()
                before = (stats["hits"], stats["misses"])
    found = {name: tokens[name.partition("_")[0]] / statistics.median(times) for name, times in spent.items()}
    found["read_per_token"] = read / (repeats * decode)
    found["peak_mib"] = peak_rss_bytes() / 2**20
    if "cache" in setting:
        stats = model.globe_stats()
        hits, misses = stats["hits"] - before[0], stats["misses"] - before[1]
        found["hit_rate"] = hits / max(1, hits + misses)
        found["cache_mib"] = stats["bytes"] / 2**20
    return found


if __name__ == "__main__":
    main()
