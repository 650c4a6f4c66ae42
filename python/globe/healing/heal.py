"""`globe heal`: a factored directory learns from the checkpoint that it was made of."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from globe._version import __version__
from globe.artifact.factored import Factored, is_factored, open_factored
from globe.artifact.output import changed_directory
from globe.checkpoint.hub import local
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.quantised import quantization_of
from globe.checkpoint.tensorfile import TensorInfo, file_sha256
from globe.compute import ranks
from globe.compute.gemm import fast_bf16
from globe.errors import GlobeError, UsageError
from globe.evaluation.models import load_model
from globe.healing.descent import Descent, Run, descend
from globe.healing.loss import geometric_mean, perplexities
from globe.healing.options import Healing
from globe.healing.parts import Moving, moving, require_movable, round_to_stored
from globe.healing.publish import finish, put_in_place, write_aside
from globe.healing.state import State
from globe.healing.texts import Reading, given_texts, read_windows, texts_key
from globe.runs.alike import require_alike
from globe.runs.stages import Display, Stages


@dataclass(frozen=True)
class Access:
    """How a healing runs: the torch device, whether the models' own Python code may run, whether a stopped healing is
    forgotten, and where the stages are shown.
    """

    device: str = "cpu"
    trust_remote_code: bool = False
    fresh: bool = False
    progress: Display | None = None


@ranks.joined()
def heal(
    out: Path | str,
    against: Path | str,
    options: Healing | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    fresh: bool = False,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Let a factored directory learn from its original, by the KL of the logits, and replace what has moved.

    The original and the factored model are in memory together. A run that is stopped goes on from
    its last checkpoint, in OUT/.globe-heal. The directory stays as it is until the end, and then too if the model has
    not become better on windows that are held out of every text: less perplexity, in their geometric mean, with the
    weights as they would be stored. Under torchrun every rank has both models, and takes its share of each batch.

    Parameters
    ----------
    out : Path or str
        Written by `globe compress`, or healed before.
    against : Path or str
        The checkpoint that was compressed.
    options : Healing, optional
        How long, what moves, on which text.
    device : str
        A torch device.
    trust_remote_code : bool
        Run Python code that the original brings with it.
    fresh : bool
        Forget a healing that was stopped.
    progress : Display, optional
        Shows the stages.

    Returns
    -------
    dict
        `kept` ("healed" or "start"), `steps`, `tokens`, `seconds`, the first and the last tenth's `kl` in nats, and per
        held-out text the perplexity `before`, `after` and of the `original` (None where it is not finite); `precision`,
        which was computed in; `options`.

    Raises
    ------
    GlobeError
        If `out` is not a whole factored directory, or was made of another checkpoint.
    UsageError
        If `out` holds a stopped healing of other options, left factors are to move that are packed, or ranks cannot
        share a batch.
    """
    return _heal(Path(out), local(against), options or Healing(), Access(device, trust_remote_code, fresh, progress))


def _heal(out: Path, against: Path, options: Healing, access: Access) -> dict[str, Any]:
    if options.batch % ranks.size():
        raise UsageError(f"batch is {options.batch} at {ranks.size()} ranks; expected as many windows for each of them")
    given = {**options.as_dict(), "device": access.device, "fresh": access.fresh}
    require_alike(given, {"source": Checkpoint(against).fingerprint()})
    stages, state = Stages(access.progress if ranks.rank() == 0 else None), State(out)
    dtype = ranks.lead(partial(_dtype, options.precision, against, torch.device(access.device)))
    with ExitStack() as claimed:
        ranks.lead(lambda: _claim(claimed, (out, against), (options, dtype), access, state))
        factored, texts = open_factored(out), given_texts(options)
        require_alike({}, {"output": factored.manifest})
        kept = dtype if dtype == torch.bfloat16 else None  # what is stored, or fp32 on a CPU
        teacher, tokenizer = load_model(against, access.device, kept, trust_remote_code=access.trust_remote_code)
        model, _ = load_model(out, access.device, dtype)
        model.globe.cache.resize(None)
        for parameter in [*teacher.parameters(), *model.parameters()]:
            parameter.requires_grad_(False)
        parts, stored = moving(model, factored, options.parts)
        read = ranks.lead(lambda: _read(state, texts, tokenizer, teacher, (options, stages)))
        with stages.stage("judge", 1) as advance:
            before, original = ranks.lead(lambda: [perplexities(each, read.held) for each in (model, teacher)])
            advance(1)
        used = ranks.agreed(float(sum(record.seconds for record in stages.records if record.name == "read")))
        with stages.stage("heal", 1.0) as advance:
            descent = descend(Run(model, teacher, parts, read.windows, used), options, state, advance)
        after = ranks.lead(lambda: _judge(parts, stored, model, read))
        told = _told(options, descent, {"before": before, "after": after, "original": original})
        told["precision"] = "bf16" if dtype == torch.bfloat16 else "fp32"
        if told["kept"] == "healed":
            with stages.stage("write", 1) as advance:
                ranks.lead(lambda: _publish(factored, parts, told, state.folder))
                advance(1)
        ranks.lead(state.remove)
    moved = sum(each.parameter.numel() for each in parts)
    return {"output": str(out), **told, "parameters": moved, "stages": stages.as_list()}


def _claim(
    claimed: ExitStack,
    where: tuple[Path, Path],
    asked: tuple[Healing, torch.dtype],
    access: Access,
    state: State,
) -> None:
    """Lock the directory, put in place what a healing left that was stopped at its end, and open the folder of this."""
    (out, against), (options, dtype) = where, asked
    if out.is_dir() and not is_factored(out):
        raise GlobeError(f"{out}: not factored; expected a directory written by globe compress")
    claimed.enter_context(changed_directory(out, against))
    if finish(out, state.folder):
        state.remove()
        if access.progress is not None:
            access.progress.log(f"{out}: what a healing that was stopped at its end had made is in place now")
    factored = open_factored(out)
    require_movable(factored, options.parts)
    _require_source(factored, against)
    state.open(_key(factored, options, given_texts(options), dtype), fresh=access.fresh)


def _publish(factored: Factored, parts: list[Moving], told: dict[str, Any], folder: Path) -> None:
    write_aside(factored, parts, told, folder)
    put_in_place(factored.directory, folder)


def _require_source(factored: Factored, against: Path) -> None:
    wanted, found = factored.manifest["source"]["fingerprint"], Checkpoint(against).fingerprint()
    if found != wanted:
        raise GlobeError(
            f"{against}: its fingerprint is {found[:12]}…, {factored.directory} was made of {wanted[:12]}…; give the "
            "checkpoint that was compressed"
        )


def _dtype(precision: str, against: Path, device: torch.device) -> torch.dtype:
    """What the models compute in: with `auto` bf16 where that is fast and the checkpoint is in it."""
    if precision == "auto":
        checkpoint = Checkpoint(against)
        whole = checkpoint.leading.dtype == torch.bfloat16 and quantization_of(checkpoint.config) is None
        precision = "bf16" if whole and fast_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _key(factored: Factored, options: Healing, texts: dict[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """What a healing that goes on must have in common with the one that was stopped."""
    files = {name: file_sha256(header.path) for name, header in factored.shards.items()}
    told = {"files": files, "options": options.as_dict(), "texts": texts_key(texts), "dtype": str(dtype)}
    return {"globe_version": __version__, **told}


def _read(state: State, texts: dict[str, str], tokenizer: Any, teacher: Any, told: tuple[Healing, Stages]) -> Reading:
    """The windows, as an earlier run read them if there was one."""
    options, stages = told
    kept = state.windows()
    if kept is not None:
        return Reading(kept["windows"], kept["held"])
    with stages.stage("read", max(1, options.own_tokens)) as advance:
        read = read_windows(texts, tokenizer, teacher, options, advance)
    state.save_windows({"windows": read.windows, "held": read.held})
    return read


def _judge(parts: list[Moving], stored: dict[str, TensorInfo], model: Any, read: Reading) -> dict[str, float]:
    """The held-out perplexities with the weights as they would be stored."""
    round_to_stored(parts, stored)
    return perplexities(model, read.held)


def _told(options: Healing, descent: Descent, judged: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What is printed and what metrics.json says."""
    better = descent.finite and geometric_mean(judged["after"].values()) < geometric_mean(judged["before"].values())
    last = descent.losses[-max(1, len(descent.losses) // 10) :]
    tokens = options.batch * options.window
    return {
        "kept": "healed" if better else "start",
        "steps": descent.steps,
        "tokens": tokens * descent.steps,
        "tokens_per_step": tokens,
        "seconds": descent.seconds,
        "kl": [_finite(loss) for loss in (descent.losses[0], sum(last) / len(last))] if last else None,
        **{name: {label: _finite(value) for label, value in found.items()} for name, found in judged.items()},
        "options": options.as_dict(),
    }


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
