"""Load a checkpoint directory, dense or factored, as a model of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint import INDEX_NAME, Checkpoint
from globe.errors import GlobeError, UsageError
from globe.foreign import missing_directory

FACTORED_MARK = "globe.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_model(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a dense or a factored checkpoint directory.

    A factored directory is loaded as it is, by `globe.hf`.

    Parameters
    ----------
    directory : str or Path
        Checkpoint directory; nothing is downloaded.
    device : str
        A torch device.
    dtype : torch.dtype, optional
        Type to compute in. By default float32 on a CPU, where 16-bit logits are noisy, and elsewhere the type the
        checkpoint is stored in.

    Returns
    -------
    tuple
        The model, in inference mode, and its tokenizer.
    """
    directory = Path(directory)
    place = find_device(device)
    transformers = import_transformers("evaluation")
    if not directory.is_dir():
        raise missing_directory(directory)
    if not (directory / "config.json").is_file():
        raise GlobeError(f"{directory}: no config.json; give a checkpoint directory as saved by transformers")
    with quiet(transformers):
        tokenizer = load_tokenizer(transformers, directory)
    wanted: Any = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if (directory / FACTORED_MARK).is_file():
        _check_factored(directory)
    elif any((directory / file).exists() for file in ("model.safetensors", INDEX_NAME)):
        Checkpoint(directory)  # a missing or truncated shard is named here
    with quiet(transformers):
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except GlobeError:
            raise
        except Exception as error:  # transformers, safetensors and the model's own code raise types of their own
            raise GlobeError(f"{directory}: transformers cannot load it: {first_line(error)}") from error
        missing = sorted(found["missing_keys"])
        if missing:
            raise GlobeError(
                f"{directory}: {len(missing)} tensors are missing from its weight files, first {missing[0]}"
            )
        for name, stored, expected in sorted(found["mismatched_keys"])[:1]:
            raise GlobeError(
                f"{directory}: tensor {name} has shape {list(stored)}, config.json asks for {list(expected)}"
            )
        return model.to(place).eval(), tokenizer


def generate_sentence(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 24) -> str:
    """Return a prompt and the model's greedy continuation of it.

    Parameters
    ----------
    model, tokenizer : Any
        A causal language model of transformers and its tokenizer.
    prompt : str
        Text to continue.
    max_new_tokens : int
        Most tokens to add.

    Returns
    -------
    str
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise UsageError("the prompt is empty")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def import_transformers(purpose: str) -> Any:
    """The transformers package, which is an optional dependency."""
    try:
        import transformers
    except ImportError as error:
        raise GlobeError(f'{purpose} needs transformers: pip install "globe-moe[hf]"') from error
    return transformers


def find_device(name: str) -> torch.device:
    """The torch device of a name, if this torch and this machine have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a torch device (cpu, cuda, cuda:1, mps)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name}: this torch finds no CUDA device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name}: this torch finds no MPS device")
    return device


def load_tokenizer(transformers: Any, directory: Path) -> Any:
    """A checkpoint directory's own tokenizer."""
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise GlobeError(f"{directory}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy it from the source")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise GlobeError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error


def _check_factored(directory: Path) -> None:
    from globe.factored import open_factored

    open_factored(directory)
    try:
        import globe.hf  # noqa: F401  (makes transformers load it)
    except ImportError as error:
        raise GlobeError(str(error)) from error


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Let transformers print and log nothing."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of another package says, in short."""
    line = str(error).strip().partition("\n")[0].partition(" For details look at")[0]
    return line or type(error).__name__
