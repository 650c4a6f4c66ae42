"""Activation statistics of a checkpoint's experts, from a text that flows through it one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from globe.checkpoint.hub import local
from globe.checkpoint.index import Checkpoint
from globe.compute import ranks
from globe.compute.devices import find_device, keep_memory
from globe.errors import GlobeError, UsageError
from globe.runs.alike import require_alike
from globe.runs.job import Job
from globe.runs.stages import Display, Stages
from globe.settings import Settings
from globe.sizes.budget import memory_limit
from globe.statistics.calibration import Calibration, load_calibration
from globe.statistics.layerwise import NotFinite
from globe.statistics.manner import NOT_ASKED, Manner
from globe.statistics.measure import measure, products, require_place
from globe.statistics.memory import fisher_plan, own_plan
from globe.statistics.mixture import AUTO, MEASURED, PYDOC, Text, mixture, tokens_for, usual_tokens
from globe.statistics.row_moments import RowMoments, kept_moments, moments_for
from globe.statistics.sampled import Means, with_own_samples
from globe.statistics.windows import WINDOW, Ask, Reading, read_windows

FILE = "calibration.safetensors"
STATISTICS = "statistics"  # the folder of FILE within a run's


@ranks.joined()
def calibrate(
    model_dir: Path | str,
    path: Path | str,
    *,
    text: Path | str | Mapping[str, float] | None = None,
    tokens: int | None = None,
    window: int = WINDOW,
    device: str = "cpu",
    row_moments: RowMoments = "auto",
    precision: str = "auto",
    fisher: bool = True,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Calibration:
    """Measure the second moments of the experts' inputs on texts, and write them to a file.

    Texts are cut into windows that do not overlap; where there are more than their share, those that cover the most of
    the vocabulary are taken. They pass through the decoder layer by layer, and only the layer in hand has its weights
    in memory, beside the hidden states of all windows and the statistics. Half of every text is held out:
    `held_out_texts` gives it.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory with a tokenizer, of an architecture that transformers has.
    path : Path or str
        The file to write; one that is there is replaced.
    text : Path, str or mapping of str to float, optional
        A `Path` is a UTF-8 file or a folder to read, a `str` a text itself (all of it). A mapping gives weights to
        ``pydoc`` (what every Python carries: help topics, sources of its library, its licence), to ``self`` (samples of
        the model itself, while the whole model is in memory) and to paths; their tokens are in these proportions, as
        far as there are any. By default pydoc and self in equal shares, or pydoc alone where samples cannot be made.
    tokens : int, optional
        Most tokens to read; by default 64 d, but from 32,768 to 131,072. Below 4 d the moments of d inputs are poorly
        known.
    window : int
        Tokens in a window. Samples of the model itself are windows of at most 256.
    device : str
        A torch device. Devices other than a CPU compute in the checkpoint's dtype; sums are kept on the CPU.
    row_moments : {"auto", "diagonal", "hidden", "full"}
        Which p × p moments of every expert are stored beside their diagonals: none; that of down's inputs, which a
        compression of down uses; or those of the rows of gate and up too. `auto` is `hidden` where that takes less than
        1 GiB, else `diagonal`.
    precision : {"auto", "fp32"}
        On a CPU: `auto` runs a checkpoint in bf16 in that dtype where the CPU has bf16 dot products, else in float32.
    fisher : bool
        Find what the loss of the next token makes of errors of the experts' products, by gradients of 8,192 of the
        tokens, which takes about four times as long as letting them through; setting `metric`: ``fisher`` uses it.
    trust_remote_code : bool
        Run Python code that the checkpoint brings with it (`auto_map`); without, such a checkpoint is refused.
    progress : Display, optional
        Shows the layers as they go.

    Returns
    -------
    Calibration
        The file. `about["texts"]` tells of every text, `about["warnings"]` of too few tokens and of experts that were
        sent none.

    Raises
    ------
    UsageError
        If an argument cannot be used, or ranks were given others.
    GlobeError
        If the checkpoint cannot be run, ranks see others, or the texts are too short.
    """
    checkpoint = Checkpoint(local(model_dir))
    if precision not in ("auto", "fp32"):
        raise UsageError(f"precision is {precision!r}; expected auto or fp32")
    given = {"text": repr(text), "tokens": tokens, "window": window, "row_moments": row_moments, "fisher": fisher}
    given |= {"precision": precision, "device": device, "trust_remote_code": trust_remote_code}
    require_alike(given, {"source": checkpoint.fingerprint()})
    keep_memory()
    place, stages = Path(path), Stages(progress if ranks.rank() == 0 else None)
    gates = checkpoint.leading
    require_place(place)
    wanted, limit = tokens if tokens is not None else usual_tokens(gates.d), memory_limit(Settings())
    where, kept = find_device(device), kept_moments(row_moments, gates)
    own = ranks.agreed(own_plan(checkpoint, wanted, len(kept), limit, where))
    back = ranks.agreed(fisher_plan(checkpoint, wanted, limit)) if fisher else NOT_ASKED
    manner = Manner(where, kept, precision, own, back)
    ask = Ask(_texts(text), wanted, window, trust_remote_code)
    reading = ranks.lead(lambda: read_windows(checkpoint, ask, stages.display.log))
    means = Means(manner, limit, stages)
    reading, _ = ranks.lead(lambda: with_own_samples(reading, ask, means, text is None))
    return measure(reading, manner, place, stages)


def calibration_for(
    checkpoint: Checkpoint, job: Job, folder: Path, *, trust_remote_code: bool = False
) -> Calibration | None:
    """The statistics that a compression uses.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model to compress.
    job : Job
        Setting `calibrate`: ``none``; ``pydoc``, ``self`` or ``auto``, to measure on what every Python carries, on
        samples of the model itself, or on both, where ``auto`` does without what cannot be had; or a calibration file
        of this checkpoint. Setting `calibration_tokens`: the most tokens to read. Settings `families` and `precision`:
        which moments are needed, and how they are computed.
    folder : Path
        Where measured statistics are kept; made here. What lies there of the same checkpoint, texts, tokens, window and
        dtype is used again if it has the moments that are needed. A run that began without statistics, or without
        samples, goes on without.
    trust_remote_code : bool
        As for `calibrate`.

    Returns
    -------
    Calibration or None

    Raises
    ------
    GlobeError
        If the file is of another checkpoint, weights give values that are not finite, or, unless `calibrate` is
        ``auto``, the model cannot be run.
    """
    choice = job.settings.calibrate
    if choice == "none":
        return None
    if is_file(choice):
        return named_calibration(checkpoint, choice)
    before = job.store.check("calibration")
    if before is not None and before["none"] is not None:  # what is fitted already was fitted without
        job.log(f"weights only, as when this run began: {before['none']}")
        return None
    folder.mkdir(exist_ok=True)
    done = len(job.stages.records)
    try:
        ask, manner = _asked(checkpoint, job, trust_remote_code)
        if before is not None and before["without"] is not None:
            ask = replace(ask, texts=mixture({PYDOC: 1}))
        reading = ranks.lead(lambda: read_windows(checkpoint, ask, job.log))
        earlier = ranks.agreed(_found_before(folder / FILE, reading, manner))
        if earlier is not None:
            for record in before["stages"] if before is not None else ():
                job.stages.recall(record)
            job.log(f"calibrated before, on {earlier.about['tokens']:,} tokens of {reading.label}")
            return earlier
        means = Means(manner, memory_limit(job.settings), job.stages)
        reading, without = ranks.lead(lambda: with_own_samples(reading, ask, means, choice == AUTO))
        found = measure(reading, manner, folder / FILE, job.stages)
    except GlobeError as error:
        if choice != AUTO or isinstance(error, NotFinite):
            raise
        job.store.save("calibration", {}, {"none": str(error)})
        job.log(f"weights only, without activation statistics: {error}")
        return None
    record = {"none": None, "without": without, "stages": job.stages.as_list()[done:]}
    job.store.save("calibration", {}, record)
    job.log(f"calibrated on {found.about['tokens']:,} tokens of {reading.label}")
    return found


def _asked(checkpoint: Checkpoint, job: Job, trust_remote_code: bool) -> tuple[Ask, Manner]:
    """What a run reads, and how it measures."""
    settings, gates = job.settings, checkpoint.leading
    tokens, longest = tokens_for(settings, gates.d), checkpoint.config.get("max_position_embeddings")
    window = min(WINDOW, longest if isinstance(longest, int) else WINDOW, tokens // 2)
    kept = moments_for(settings.families, gates)
    limit = memory_limit(settings)
    own = ranks.agreed(own_plan(checkpoint, tokens, len(kept), limit, job.device))
    back = ranks.agreed(fisher_plan(checkpoint, tokens, limit)) if settings.metric == "fisher" else NOT_ASKED
    manner = Manner(job.device, kept, settings.precision, own, back)
    return Ask(mixture({settings.calibrate: 1}), tokens, window, trust_remote_code), manner


def _texts(text: Path | str | Mapping[str, float] | None) -> tuple[Text, ...]:
    if isinstance(text, str):
        return (Text("given text", 1.0, "given text", text),)
    if isinstance(text, Path):
        return mixture({str(text): 1})
    return mixture({AUTO: 1} if text is None else text)


def is_file(choice: str) -> bool:
    """Whether a choice of calibration names a file."""
    return choice != "none" and choice not in MEASURED


def named_calibration(checkpoint: Checkpoint, choice: str) -> Calibration | None:
    """The calibration file that a choice names, if it does.

    Raises
    ------
    GlobeError
        If it is not one, or of another checkpoint.
    """
    if not is_file(choice):
        return None
    found = load_calibration(Path(choice))
    if found.about.get("fingerprint") != checkpoint.fingerprint():
        raise GlobeError(
            f"calibration {choice}: made of another checkpoint than {checkpoint.directory}; run globe calibrate on "
            "this one"
        )
    return found


def _found_before(path: Path, reading: Reading, manner: Manner) -> Calibration | None:
    """The statistics of a file, if they are those of this reading, whose samples need not be there."""
    try:
        found = load_calibration(path)
    except GlobeError:
        return None
    wanted = {**reading.about, "products": products(reading, manner)}
    told, texts = found.about.get("texts", []), wanted.pop("texts")
    same = all(found.about.get(key) == value for key, value in wanted.items() if key != "text")
    same &= len(told) == len(texts) and all(
        text.items() <= there.items() for text, there in zip(texts, told, strict=False)
    )
    before = found.about.get("fisher", {}).get("none", NOT_ASKED.why_not)
    same &= before != NOT_ASKED.why_not or not manner.fisher.tokens
    return found if same and all(map(found.has, manner.kept)) else None
