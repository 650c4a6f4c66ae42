"""Activation statistics of a checkpoint's experts, from a text that flows through it one decoder layer at a time."""

from __future__ import annotations

from pathlib import Path

from globe.checkpoint.index import Checkpoint
from globe.compute.devices import find_device, keep_memory
from globe.errors import GlobeError, UsageError
from globe.runs.job import Job
from globe.runs.stages import Display, Stages
from globe.statistics.calibration import Calibration, load_calibration
from globe.statistics.layerwise import NotFinite
from globe.statistics.measure import Manner, measure, products
from globe.statistics.row_moments import RowMoments, kept_moments, moments_for
from globe.statistics.windows import TOKENS, WINDOW, Reading, read_windows

FILE = "calibration.safetensors"
STATISTICS = "statistics"  # the folder of FILE within a run's


def calibrate(
    model_dir: Path | str,
    path: Path | str,
    *,
    text: Path | str | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    device: str = "cpu",
    row_moments: RowMoments = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Calibration:
    """Measure the second moments of the experts' inputs on a text, and write them to a file.

    The text is cut into windows that do not overlap. They pass through the decoder layer by layer, and only the layer
    in hand has its weights in memory, beside the hidden states of all windows and the statistics.

    Parameters
    ----------
    model_dir : Path or str
        A dense checkpoint directory with a tokenizer, of an architecture that transformers has.
    path : Path or str
        The file to write; one that is there is replaced.
    text : Path or str, optional
        A `Path` is a UTF-8 file to read, a `str` the text itself; by default the calibration half of
        `evaluation_text`, which shares no character with the half that `evaluate` reads.
    tokens : int
        Most tokens to read. Below 4 d the moments of d inputs are poorly known.
    window : int
        Tokens in a window.
    device : str
        A torch device. Devices other than a CPU compute in the checkpoint's dtype; sums are kept on the CPU.
    row_moments : {"auto", "diagonal", "hidden", "full"}
        Which p × p moments of every expert are stored beside their diagonals: none; that of down's inputs, which a
        compression of down uses; or those of the rows of gate and up too. `auto` is `hidden` where that takes less than
        1 GiB, else `diagonal`.
    precision : {"auto", "fp32"}
        On a CPU: `auto` runs a checkpoint in bf16 in that dtype where the CPU has bf16 dot products, else in float32.
    trust_remote_code : bool
        Run Python code that the checkpoint brings with it (`auto_map`); without, such a checkpoint is refused.
    progress : Display, optional
        Shows the layers as they go.

    Returns
    -------
    Calibration
        The file. `about["warnings"]` tells of too few tokens and of experts that were sent none.

    Raises
    ------
    UsageError
        If an argument cannot be used.
    GlobeError
        If the checkpoint cannot be run or the text is too short.
    """
    checkpoint = Checkpoint(Path(model_dir))
    if precision not in ("auto", "fp32"):
        raise UsageError(f"precision is {precision!r}; expected auto or fp32")
    keep_memory()
    reading = read_windows(checkpoint, text, tokens, window, trust_remote_code)
    kept = kept_moments(row_moments, checkpoint.family("gate"))
    return measure(reading, Manner(find_device(device), kept, precision), Path(path), Stages(progress))


def calibration_for(
    checkpoint: Checkpoint, job: Job, folder: Path, *, trust_remote_code: bool = False
) -> Calibration | None:
    """The statistics that a compression uses.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model to compress.
    job : Job
        Setting `calibrate`: ``none``; ``pydoc``, to measure on `calibrate`'s own text; ``auto``, the same where the
        model can be run and else none; or a calibration file of this checkpoint. Setting `calibration_tokens`: the
        most tokens to read. Settings `families` and `precision`: which moments are needed, and how they are computed.
    folder : Path
        Where measured statistics are kept; made here. What lies there of the same checkpoint, text, tokens, window and
        dtype is used again if it has the moments that are needed. A run that began without statistics goes on without.
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
    choice, tokens = job.settings.calibrate, job.settings.calibration_tokens
    if choice == "none":
        return None
    if is_file(choice):
        return named_calibration(checkpoint, choice)
    before = job.store.check("calibration")
    if before is not None and before["none"] is not None:  # what is fitted already was fitted without
        job.log(f"weights only, as when this run began: {before['none']}")
        return None
    folder.mkdir(exist_ok=True)
    try:
        longest = checkpoint.config.get("max_position_embeddings")
        window = min(WINDOW, longest if isinstance(longest, int) else WINDOW, tokens // 2)
        reading = read_windows(checkpoint, None, tokens, window, trust_remote_code)
        kept = moments_for(job.settings.families, checkpoint.family("gate"))
        manner = Manner(job.device, kept, job.settings.precision)
        earlier = _found_before(folder / FILE, reading, manner)
        if earlier is not None:
            if before is not None:
                job.stages.recall(before["stage"])
            job.log(f"calibrated before, on {earlier.about['tokens']:,} tokens of {reading.label}")
            return earlier
        found = measure(reading, manner, folder / FILE, job.stages)
    except GlobeError as error:
        if choice == "pydoc" or isinstance(error, NotFinite):
            raise
        job.store.save("calibration", {}, {"none": str(error)})
        job.log(f"weights only, without activation statistics: {error}")
        return None
    job.store.save("calibration", {}, {"none": None, "stage": job.stages.as_list()[-1]})
    job.log(f"calibrated on {found.about['tokens']:,} tokens of {reading.label}")
    return found


def is_file(choice: str) -> bool:
    """Whether a choice of calibration names a file."""
    return choice not in ("none", "auto", "pydoc")


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
    try:
        found = load_calibration(path)
    except GlobeError:
        return None
    wanted = {**reading.about, "products": products(reading, manner)}
    same = all(found.about.get(key) == value for key, value in wanted.items() if key != "text")
    return found if same and all(map(found.has, manner.kept)) else None
