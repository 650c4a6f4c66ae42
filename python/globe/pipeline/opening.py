"""The beginning of a compression: what is found, what fits, and what it will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from globe._version import __version__
from globe.artifact.owned import Claim, Scratch, factored_names
from globe.artifact.run_directory import Identity, run_key
from globe.checkpoint.companions import companions
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.quantised import quantised_dtypes, quantization_of, told
from globe.choice.plan import Plan, peaks, plan, require_correction_memory
from globe.compute import ranks
from globe.compute.blocks import BLOCKS
from globe.compute.devices import check_device, keep_memory, set_threads
from globe.compute.gemm import precision_report, solver_dtype
from globe.correction.work import corrected_bytes, down_rank
from globe.errors import UsageError
from globe.runs.alike import require_alike
from globe.runs.stages import Stages
from globe.settings import Settings
from globe.sizes.budget import machine_memory, size_text
from globe.sizes.kept import fits_jointly, kept
from globe.sizes.ratios import stored_elements
from globe.statistics.calibrate import is_file
from globe.statistics.memory import require_memory


@dataclass(frozen=True)
class Opened:
    """A checkpoint that a compression fits: where it lies, the plan, and the SHA-256 that tells it from others.

    `trust_remote_code` where Python code that it brings with it may run.
    """

    source: Path
    plan: Plan
    fingerprint: str
    trust_remote_code: bool

    def claim(self, settings: Settings) -> Claim:
        """What the run writes into its output directory, the bytes that this takes, and the calibration it reads."""
        checkpoint = self.plan.checkpoint
        shards = [shard.path.name for shard in checkpoint.shards]
        names = factored_names(shards, companions(checkpoint.directory).carried)
        reads = (Path(settings.calibrate),) if is_file(settings.calibrate) else ()
        return Claim(self.source, names, _needed_bytes(self.plan, settings), reads, _scratch(self.plan, settings))

    def identity(self, settings: Settings) -> Identity:
        """What the weight files depend on."""
        key = run_key(__version__, self.fingerprint, settings.as_dict(), ranks.size())
        return Identity(key, environment(self.plan, settings))

    def described(self) -> dict[str, Any]:
        """What the manifest and metrics.json say of the source."""
        layout = self.plan.checkpoint.layout.name
        return {"path": str(self.source), "layout": layout, "fingerprint": self.fingerprint}


def open_source(source: Path, settings: Settings, stages: Stages, *, trust_remote_code: bool = False) -> Opened:
    """Index a checkpoint, resolve the settings on it, and set the process up for them; nothing is written.

    Raises
    ------
    UsageError
        If a setting does not fit the checkpoint or saves nothing.
    GlobeError
        If the checkpoint or the device cannot be used.
    """
    with stages.stage("index", 1):
        planned = plan(source, settings)
        checkpoint, log = planned.checkpoint, stages.display.log
        for line in checkpoint.notes:
            log(line)
        set_threads(settings.threads)
        keep_memory()
        check_device(planned.device)
        require_memory(checkpoint, settings)
        require_correction_memory(planned, settings)
        for line in _formats(checkpoint):
            log(f"{source}: {line}")
        return Opened(source, planned, checkpoint.fingerprint(), trust_remote_code)


def open_alike(source: Path, settings: Settings, stages: Stages, *, trust_remote_code: bool = False) -> Opened:
    """`open_source` at every rank, and the same there: what is in hand at a time is what rank 0 has room for.

    Raises
    ------
    UsageError
        If ranks have other settings, or there are more of them than layers.
    GlobeError
        If one sees another checkpoint, or cannot use it.
    """
    with ranks.together():
        opened = open_source(source, settings, stages, trust_remote_code=trust_remote_code)
    key = dict(opened.identity(settings).key)
    require_alike({"settings": key.pop("settings")}, key)
    layers = opened.plan.checkpoint.leading.layers
    if ranks.size() > layers:
        raise UsageError(
            f"{ranks.size()} ranks for {layers} layers with experts; expected at most a rank for each layer: use "
            f"--nproc-per-node {layers} or less"
        )
    return replace(opened, plan=replace(opened.plan, blocks=ranks.agreed(opened.plan.blocks)))


def _formats(checkpoint: Checkpoint) -> Iterator[str]:
    """What is stored as codes, and what becomes of it."""
    formats = sorted({matrix.scheme.text for matrix in checkpoint.encoded})
    if formats:
        yield f"experts are {' and '.join(formats)}: decoded as they are read, and in an export"
    parts = {part.tensor for matrix in checkpoint.encoded for part in matrix.parts.values()}
    dtypes = [info.dtype for name, info in checkpoint.tensors.items() if name not in parts]
    if quantised_dtypes(dtypes):
        yield f"{told(dtypes, quantization_of(checkpoint.config))}: kept as they are"


def environment(planned: Plan, settings: Settings) -> dict[str, Any]:
    """What may show in the last bits of the weights."""
    return {
        "device": str(planned.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "blocks": asdict(planned.blocks),
        "precision": precision_report(settings.precision, planned.device),
    }


def _needed_bytes(planned: Plan, settings: Settings, scratch: int = 0) -> int:
    """Disk that a run takes: banks in fp32, and scratch files, while a family is fitted, or the output.

    A fitted bank is kept in bf16, and where atoms are packed in integers of 8 bits too.

    Of the loops three, the best, the newest and the next; of the joint fit its start, and the newest and the next with
    the step that led there.
    """
    families, shapes = planned.families, planned.shapes
    everything = sum(info.nbytes for info in planned.checkpoint.tensors.values())
    touched = sum(family.stored_bytes for family in families.values())
    output = everything - touched + 2 * sum(stored_elements(families[name], shapes[name]) for name in families)
    banks = [shapes[name].bank * shapes[name].rank * family.d for name, family in families.items()]
    packed = sum(size for name, size in zip(families, banks, strict=True) if shapes[name].storage.atoms is not None)
    saved = 5 if fits_jointly(settings) else 3
    corrected = 0
    if settings.correct == "down":
        corrected = corrected_bytes(planned.checkpoint, down_rank(families, shapes))
    return 2 * sum(banks) + packed + max(output + corrected, saved * 4 * max(banks) + scratch)


def scratch_bytes(planned: Plan, settings: Settings) -> int:
    """Disk that the joint fit takes for what it keeps of single experts and memory has no room for: of one pool.

    Of all ranks, whose files lie side by side.
    """
    cached, families = planned.blocks.cached, planned.families
    size = solver_dtype(settings.precision, planned.device).itemsize
    return ranks.size() * max(
        kept(family, planned.shapes[name], settings, size, cached).on_disk for name, family in families.items()
    )


def _scratch(planned: Plan, settings: Settings) -> Scratch | None:
    """What scratch files take beside all that the run takes without them, and what would do without them."""
    size = _needed_bytes(planned, settings, scratch_bytes(planned, settings)) - _needed_bytes(planned, settings)
    if size == 0:
        return None
    remedies = ["--solver alternate"]
    needed = max(peaks(planned, settings, replace(planned.blocks, cached=BLOCKS.cached)).values())
    if needed <= machine_memory():
        remedies.insert(0, f"--max-memory {size_text(needed)}")
    return Scratch(size, " or ".join(remedies))
