"""What transformers makes of a source directory: the package, which is optional, kept quiet, and its tokenizers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from globe.checkpoint.json_file import read_json
from globe.errors import GlobeError

_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def import_transformers(purpose: str) -> Any:
    """The transformers package, which is an optional dependency."""
    try:
        import transformers
    except ImportError as error:
        raise GlobeError(f'{purpose} needs transformers: pip install "globe-moe[hf]"') from error
    return transformers


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


def text_class(transformers: Any, config: Any) -> Any:
    """The class of transformers that loads a model that gives text: of several models only one for images has it."""
    known = (getattr(transformers, name, None) for name in _AUTO)
    return next(
        (auto for auto in known if auto and type(config) in auto._model_mapping), transformers.AutoModelForCausalLM
    )


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
