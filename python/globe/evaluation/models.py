"""Load a checkpoint directory, dense or factored, as a model of transformers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.foreign import missing_directory
from globe.checkpoint.index import INDEX_NAME, Checkpoint, read_json
from globe.checkpoint.quantised import KEY, quantised_dtypes
from globe.errors import GlobeError, UsageError

FACTORED_MARK = "globe.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_model(
    directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
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
        checkpoint is stored in. Tensors that are stored as fp8 are dequantised on a CPU, as transformers does.
    trust_remote_code : bool
        Run Python code that the directory brings with it (`auto_map`); without, such a directory is refused.

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
        tokenizer = load_tokenizer(transformers, directory, trust_remote_code)
    wanted: Any = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if (directory / FACTORED_MARK).is_file():
        _check_factored(directory)
        trust_remote_code, dtypes = False, None  # its own code only stands in for globe.hf, which is imported now
    elif any((directory / file).exists() for file in ("model.safetensors", INDEX_NAME)):
        # a missing or truncated shard is named here
        dtypes = quantised_dtypes(info.dtype for info in Checkpoint(directory).tensors.values())
    else:
        dtypes = None
    with quiet(transformers):
        try:
            config = _config(transformers, directory, trust_remote_code, dtypes, place)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except GlobeError:
            raise
        except Exception as error:  # transformers, safetensors and the model's own code raise types of their own
            refuse_own_code(directory, error)
            raise GlobeError(f"{directory}: transformers cannot load it: {first_line(error)}") from error
        if dtypes and wanted is torch.float32 and not any(p.dtype.itemsize == 1 for p in model.parameters()):
            model.to(wanted)  # transformers leaves what it dequantises, and the tensors beside it, in several dtypes
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


def load_tokenizer(transformers: Any, directory: Path, trust_remote_code: bool = False) -> Any:
    """A checkpoint directory's own tokenizer."""
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise GlobeError(f"{directory}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy it from the source")
    stated = _told(directory / "tokenizer_config.json")
    known = hasattr(transformers, str(stated.get("tokenizer_class")))
    if "auto_map" in stated and not known and not trust_remote_code:  # transformers may take another class in its place
        raise _own_code(directory / "tokenizer_config.json")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain Exception
        refuse_own_code(directory, error)
        raise GlobeError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error


def refuse_own_code(directory: Path, error: BaseException) -> None:
    """Say in one line that a directory brings Python code, if that is the error that transformers raises.

    Raises
    ------
    GlobeError
        If it is.
    """
    if isinstance(error, ValueError) and "trust_remote_code=True" in str(error):
        names = [name for name in ("tokenizer_config.json", "config.json") if "auto_map" in _told(directory / name)]
        raise _own_code(directory / (names or ["config.json"])[0]) from error


def _own_code(path: Path) -> GlobeError:
    return GlobeError(
        f"{path}: auto_map names Python code of the checkpoint's own, which is not run; read it, and allow it with "
        "--trust-remote-code (in Python, trust_remote_code=True)"
    )


def _told(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _config(
    transformers: Any, directory: Path, trust_remote_code: bool, dtypes: list[str] | None, place: torch.device
) -> Any:
    """The configuration, without a quantization_config that none of the tensors needs; `dtypes` are the quantised."""
    config = transformers.AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=trust_remote_code
    )
    quantization = getattr(config, KEY, None)
    if dtypes is not None and quantization is not None:
        if not dtypes:
            delattr(config, KEY)
        elif place.type == "cpu" and quantization.get("quant_method") == "fp8":
            setattr(config, KEY, {**quantization, "dequantize": True})  # also where the machine has a GPU
    return config


def _check_factored(directory: Path) -> None:
    from globe.artifact.factored import open_factored

    open_factored(directory)
    try:
        import globe.hf  # noqa: F401  (makes transformers load it)
    except ImportError as error:
        raise GlobeError(str(error)) from error


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Let transformers log nothing, and nothing of a checkpoint's own code print on stdout."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of another package says, in short."""
    line = str(error).strip().partition("\n")[0].partition(" For details look at")[0]
    return line or type(error).__name__
