"""Load a checkpoint directory, dense or factored, as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.foreign import missing_directory
from globe.checkpoint.hub import local
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.pretrained import (
    first_line,
    import_transformers,
    load_tokenizer,
    quiet,
    refuse_own_code,
    text_class,
)
from globe.checkpoint.quantised import KEY, quantised_dtypes, quantization_of, require_plain
from globe.checkpoint.shards import INDEX_NAME
from globe.compute.devices import find_device
from globe.errors import GlobeError, UsageError

FACTORED_MARK = "globe.json"


def load_model(
    directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a dense or a factored checkpoint directory.

    A factored directory is loaded as it is, by `globe.hf`.

    Parameters
    ----------
    directory : str or Path
        Checkpoint directory, or a name on the hub.
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
    directory = local(directory)
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
        checkpoint = Checkpoint(directory)
        dtypes = quantised_dtypes(info.dtype for info in checkpoint.tensors.values())
        if quantization_of(checkpoint.config) is None:
            require_plain(directory, dtypes, None)
    else:
        dtypes = None
    with quiet(transformers):
        try:
            config = _config(transformers, directory, trust_remote_code, dtypes, place)
            model, found = text_class(transformers, config).from_pretrained(
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
        return _speaking(model.to(place).eval()), tokenizer


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


def _config(
    transformers: Any, directory: Path, trust_remote_code: bool, dtypes: list[str] | None, place: torch.device
) -> Any:
    """The configuration, without a quantization_config that none of the tensors needs; `dtypes` are the quantised."""
    config = transformers.AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=trust_remote_code
    )
    for told in (config, config.get_text_config()):  # of several models; often the same
        quantization = getattr(told, KEY, None)
        if dtypes is not None and quantization is not None:
            if not dtypes:
                delattr(told, KEY)
            elif place.type == "cpu" and quantization.get("quant_method") == "fp8":
                setattr(told, KEY, {**quantization, "dequantize": True})  # also where the machine has a GPU
    return config


def _speaking(model: Any) -> Any:
    """The model of several that has text's forward pass: qwen3_omni_moe has none of its own."""
    found = getattr(model, "thinker", model)
    if found is not model and hasattr(model, "globe"):
        found.globe, found.globe_stats = model.globe, model.globe_stats
    return found


def _check_factored(directory: Path) -> None:
    from globe.artifact.factored import open_factored

    open_factored(directory)
    try:
        import globe.hf  # noqa: F401  (makes transformers load it)
    except ImportError as error:
        raise GlobeError(str(error)) from error
