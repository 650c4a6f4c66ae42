"""The pipeline: a checkpoint directory in, a factored directory out."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from globe import __version__
from globe.card import model_card
from globe.checkpoint import Checkpoint, Family
from globe.errors import UsageError
from globe.factored import FORMAT_VERSION, MANIFEST
from globe.gemm import pick_device, set_threads
from globe.metrics import proxy_error, stored_report, training_report
from globe.output import copy_companions, output_directory
from globe.proxies import Scan, scan, split_rows
from globe.ratios import Ratios, Shape, ratios, stored_elements
from globe.seeds import METHODS, SeedTask
from globe.settings import Settings
from globe.stages import Display, Stages
from globe.sweep import State
from globe.tensorfile import write_text
from globe.training import train
from globe.write import Fit, manifest, rounded, write_weights

_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Result:
    """A finished compression: where it lies, what metrics.json says, and the three ratios."""

    directory: Path
    metrics: dict[str, Any]
    ratio: Ratios


def compress(
    model_dir: Path | str,
    out_dir: Path | str,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Display | None = None,
) -> Result:
    """Factor the routed experts of a checkpoint: W_i ≈ A_i Σ_j α_ij B_j with one bank per family.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory of a known layout.
    out_dir : Path or str
        The factored directory; made here. config.json is renamed into place last.
    settings : Settings, optional
        Defaults of the specification, section M.
    overwrite : bool
        Replace an output that is not empty.
    progress : Display, optional
        Shows stages and lines as they go.

    Returns
    -------
    Result

    Raises
    ------
    UsageError
        If a setting does not fit the checkpoint or saves nothing.
    GlobeError
        If the checkpoint or the output directory cannot be used.
    """
    settings = settings or Settings()
    stages = Stages(progress)
    with stages.stage("index", 1):
        checkpoint = Checkpoint(Path(model_dir))
        families = {name: checkpoint.family(name) for name in settings.families}
        shapes = {
            name: Shape(
                settings.resolve_rank(family.p, family.d),
                settings.resolve_bank(len(family)),
                len(family) * _expected_support(settings, len(family)),
            )
            for name, family in families.items()
        }
        planned = ratios(checkpoint, families, shapes)
        if planned.touched >= 1:
            raise UsageError(
                f"rank {settings.rank} with these banks stores {planned.touched:.3f} of the touched matrices and saves "
                "nothing; lower --rank or --bank-size (globe inspect shows the choices)"
            )
        device = pick_device(settings.device)
        set_threads(settings.threads)
    needed = _needed_bytes(checkpoint, families, shapes)
    with output_directory(Path(out_dir), Path(model_dir), overwrite=overwrite, needed_bytes=needed) as target:
        scans: dict[str, Scan] = {}
        for name, family in families.items():  # all families before the first is trained: a bad tensor ends it early
            with stages.stage(f"{name}: scan", len(family)) as advance:
                scans[name] = scan(family, settings, advance)
        fits: dict[str, Fit] = {}
        reports: dict[str, dict[str, Any]] = {}
        for name, family in families.items():
            fits[name], reports[name] = _factor(family, shapes[name], scans[name], settings, device, stages, target)
        with stages.stage("write", sum(len(family) for family in families.values())) as advance:
            written = write_weights(checkpoint, fits, target, settings, advance)
        for name, report in reports.items():
            report.update(stored_report(name, fits[name], written))
        actual = ratios(
            checkpoint,
            families,
            {
                name: Shape(shape.rank, shape.bank, int(np.count_nonzero(fits[name].state.codes)))
                for name, shape in shapes.items()
            },
        )
        source = {"path": str(model_dir), "layout": checkpoint.layout.name, "fingerprint": checkpoint.fingerprint()}
        width = next(iter(families.values())).bytes_per_weight
        metrics = {
            "globe_version": __version__,
            "families": reports,
            "ratio": asdict(actual),
            "bytes": {
                "touched": sum(len(family) * family.p * family.d for family in families.values()) * width,
                "experts": checkpoint.expert_elements() * width,
                "checkpoint": sum(info.nbytes for info in checkpoint.tensors.values()),
                "stored": sum(file.stat().st_size for file in target.glob("*.safetensors")),
            },
            "device": str(device),
            "threads": torch.get_num_threads(),
            "settings": settings.as_dict(),
            "source": source,
            "stages": stages.as_list(),
        }
        copy_companions(checkpoint.directory, target)
        _write_json(target / MANIFEST, manifest(checkpoint, families, shapes, settings, source))
        _write_json(target / "metrics.json", metrics)
        write_text(target / "README.md", model_card(Path(model_dir).resolve().name, metrics))
        quantization = {"quant_method": "globe", "format_version": FORMAT_VERSION}
        _write_json(target / "config.json", {**checkpoint.config, "quantization_config": quantization})
    return Result(Path(out_dir), metrics, actual)


def _expected_support(settings: Settings, experts: int) -> int:
    bank = settings.resolve_bank(experts)
    steered = settings.codes in ("entmax", "sparsemax") and settings.outer_loops > 0
    return min(bank, settings.support) if steered else bank // 2


def _needed_bytes(checkpoint: Checkpoint, families: dict[str, Family], shapes: dict[str, Shape]) -> int:
    everything = sum(info.nbytes for info in checkpoint.tensors.values())
    touched = sum(len(family) * family.p * family.d * family.bytes_per_weight for family in families.values())
    return everything - touched + 2 * sum(stored_elements(families[name], shapes[name]) for name in families)


def _factor(
    family: Family,
    shape: Shape,
    scanned: Scan,
    settings: Settings,
    device: torch.device,
    stages: Stages,
    scratch: Path,
) -> tuple[Fit, dict[str, Any]]:
    name = family.name
    rows = split_rows(family.p, shape.rank, scanned.row_energy, settings)
    method = METHODS[settings.method]
    passes = method.passes(settings)
    with stages.stage(f"{name}: seeds", passes) as advance, tempfile.TemporaryDirectory(dir=scratch) as folder:
        task = SeedTask(
            family, rows, shape.bank, settings, device, _BLOCK_BYTES, Path(folder), advance, stages.display.log
        )
        seeds = method(task)
    state = State(seeds.bank, seeds.codes, settings.temperature)
    with stages.stage(f"{name}: loops", (settings.outer_loops + 1) * len(family)) as advance:
        training = train(family, rows, state, settings, advance, stages.display.log)
    fit = Fit(family, rounded(training.state))
    report = training_report(shape, rows, seeds, training)
    with stages.stage(f"{name}: proxies", 1) as advance:
        report["proxy_error"] = proxy_error(family, rows, fit.state.bank, _BLOCK_BYTES, advance)
    if training.measure.ridged:
        stages.display.log(f"{name}: {training.measure.ridged} left factors were ill-conditioned and took a ridge")
    return fit, report


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
