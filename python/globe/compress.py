"""The pipeline: a checkpoint directory in, a factored directory out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe import __version__, kernels
from globe.card import model_card
from globe.checkpoint import Checkpoint, Family
from globe.codes import initial_codes, supports
from globe.errors import UsageError
from globe.factored import FORMAT_VERSION, MANIFEST
from globe.gemm import bank_gram, correlations, pick_device
from globe.output import copy_companions, output_directory
from globe.proxies import Advance, Rows, proxy_blocks, scan, split_rows
from globe.ratios import Ratios, Shape, ratios
from globe.seeds import Seeds, ts_pca
from globe.settings import Settings
from globe.stages import Display, Stages
from globe.sweep import State
from globe.tensorfile import write_text
from globe.training import Training, train
from globe.write import Fit, Written, rounded, write_weights

Array = NDArray[np.float64]


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
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
    needed = int(2 * planned.checkpoint * checkpoint.elements())
    with output_directory(Path(out_dir), Path(model_dir), overwrite=overwrite, needed_bytes=needed) as target:
        fits: dict[str, Fit] = {}
        reports: dict[str, dict[str, Any]] = {}
        for name, family in families.items():
            fits[name], reports[name] = _factor(family, shapes[name], settings, device, stages)
        with stages.stage("write", sum(len(family) for family in families.values())) as advance:
            written = write_weights(checkpoint, fits, target, settings, advance)
        for name, report in reports.items():
            report.update(_stored_report(name, fits[name], written))
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
        _write_json(target / MANIFEST, _manifest(checkpoint, families, shapes, settings, source))
        _write_json(target / "metrics.json", metrics)
        write_text(target / "README.md", model_card(Path(model_dir).resolve().name, metrics))
        quantization = {"quant_method": "globe", "format_version": FORMAT_VERSION}
        _write_json(target / "config.json", {**checkpoint.config, "quantization_config": quantization})
    return Result(Path(out_dir), metrics, actual)


def _expected_support(settings: Settings, experts: int) -> int:
    bank = settings.resolve_bank(experts)
    steered = settings.codes in ("entmax", "sparsemax") and settings.outer_loops > 0
    return min(bank, settings.support) if steered else bank // 2


def _factor(
    family: Family, shape: Shape, settings: Settings, device: torch.device, stages: Stages
) -> tuple[Fit, dict[str, Any]]:
    name = family.name
    with stages.stage(f"{name}: scan", len(family)) as advance:
        scanned = scan(family, settings, advance)
    rows = split_rows(family.p, shape.rank, scanned.row_energy, settings)
    with stages.stage(f"{name}: seeds", 2 * shape.rank) as advance:
        seeds = ts_pca(family, rows, shape.bank, device, advance)
    gram = bank_gram(seeds.bank)
    nnls = kernels.nnls(gram, seeds.correlations).codes
    state = State(seeds.bank, initial_codes(gram, seeds.correlations, settings.init_codes), settings.temperature)
    with stages.stage(f"{name}: loops", (settings.outer_loops + 1) * len(family)) as advance:
        training = train(family, rows, state, settings, advance, stages.display.log)
    fit = Fit(family, rounded(training.state))
    with stages.stage(f"{name}: proxies", shape.rank) as advance:
        final = _proxy_error(family, rows, fit.state.bank, advance)
    report = _report(shape, rows, seeds, training)
    report["init"]["proxy_error"] = _coding_error(gram, seeds.correlations, nnls)
    report["proxy_error"] = final
    if training.measure.ridged:
        stages.display.log(f"{name}: {training.measure.ridged} left factors were ill-conditioned and took a ridge")
    return fit, report


def _report(shape: Shape, rows: Rows, seeds: Seeds, training: Training) -> dict[str, Any]:
    return {
        "rank": shape.rank,
        "bank": shape.bank,
        "validation_rows": len(rows.validation),
        "explained_variance": seeds.explained_variance,
        "init": {"relative_error": training.initial.relative_error},
        "temperature": training.state.temperature,
        "stopped": training.stopped,
        "history": [record.as_dict() for record in training.history],
    }


def _stored_report(name: str, fit: Fit, written: Written) -> dict[str, Any]:
    """What is measured on the factors as stored."""
    errors, energies = written.errors[name], written.energies[name]
    gram = bank_gram(fit.state.bank)
    norms = np.sqrt(np.diag(gram))
    unit = gram / np.outer(norms, norms)
    off = unit - np.diag(np.diag(unit))
    sizes = supports(fit.state.codes)
    return {
        "relative_error": float(errors.sum() / energies.sum()),
        "expert_errors": (errors / np.where(energies > 0, energies, 1.0)).tolist(),
        "ridged_left_factors": written.ridged[name],
        "support_median": float(np.median(sizes)),
        "support_histogram": np.bincount(sizes, minlength=len(gram) + 1).tolist(),
        "atom_popularity": np.count_nonzero(fit.state.codes, axis=0).tolist(),
        "coherence": float(np.linalg.norm(unit - np.eye(len(gram)))),
        "coherence_max": float(np.abs(off).max()),
        "atom_norm_max_deviation": float(np.abs(norms - 1).max()),
    }


def _coding_error(gram: Array, correlation: Array, codes: Array) -> float:
    """Relative error of codes on unit vectors, from the small Gram and correlations alone."""
    error = 1 - 2 * (codes * correlation).sum(1) + np.einsum("ij,jk,ik->i", codes, gram, codes)
    return float(error.mean())


def _proxy_error(family: Family, rows: Rows, bank: torch.Tensor, advance: Advance) -> float:
    """Relative error of the NNLS codes of the normalised proxies on a bank."""
    products, energy = np.zeros((len(family), len(bank))), np.zeros(len(family))
    for span, block in proxy_blocks(family, rows.proxy, bank.device, 256 << 20, advance):
        products += correlations(block, bank[:, span].contiguous())
        energy += block.pow(2).sum(1).cpu().double().numpy()
    products /= np.sqrt(np.where(energy > 0, energy, 1.0))[:, None]
    gram = bank_gram(bank)
    return _coding_error(gram, products, kernels.nnls(gram, products).codes)


def _manifest(
    checkpoint: Checkpoint,
    families: dict[str, Family],
    shapes: dict[str, Shape],
    settings: Settings,
    source: dict[str, Any],
) -> dict[str, Any]:
    described = {}
    for name, family in families.items():
        tensors: dict[str, list[int]] = {}
        for number, expert in enumerate(family.experts):
            tensors.setdefault(expert.tensor, []).append(number)
        described[name] = {
            "experts": len(family),
            "p": family.p,
            "d": family.d,
            "rank": shapes[name].rank,
            "bank": shapes[name].bank,
            "tensors": tensors,
        }
    shards = [
        {
            "file": shard.path.name,
            "metadata": shard.metadata,
            "tensors": {key: {"dtype": info.dtype, "shape": list(info.shape)} for key, info in shard.tensors.items()},
        }
        for shard in checkpoint.shards
    ]
    index_metadata = None if checkpoint.index is None else checkpoint.index.get("metadata", {})
    return {
        "format_version": FORMAT_VERSION,
        "globe_version": __version__,
        "settings": settings.as_dict(),
        "families": described,
        "source": {**source, "index_metadata": index_metadata, "shards": shards},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
