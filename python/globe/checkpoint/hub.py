"""A model's name on the Hugging Face Hub in place of a directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from globe.errors import GlobeError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_NEEDED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.safetensors")
# Folders but for additional_chat_templates, and the same weights in other names.
_BESIDE = ("[!a]*/*", "a[!d]*/*", "consolidated*")
_INDEX = "model.safetensors.index.json"


def local(model: Path | str) -> Path:
    """The directory of a model: its own, or for a name on the hub a snapshot in the hub's cache.

    Of a repository the weights in safetensors, configurations, tokenizer, templates and code files at its top are
    fetched, as far as they are not in the cache. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are the hub's own.

    Parameters
    ----------
    model : Path or str
        A path, or where there is nothing NAMESPACE/NAME, with a branch, tag or commit as NAMESPACE/NAME@REVISION.

    Raises
    ------
    GlobeError
        If it cannot be fetched.
    """
    named = _named(model)
    if named is None:
        return Path(model)
    hub = _import_hub(model)
    try:
        return _snapshot(hub, *named)
    except Exception as error:  # the hub's, the HTTP client's and hf_xet's
        raise _refused(model, error) from error


def _snapshot(hub: Any, repository: str, revision: str | None, **options: Any) -> Path:
    found = hub.snapshot_download(
        repository,
        revision=revision,
        endpoint=_endpoint(),
        library_name="globe-moe",
        allow_patterns=list(_NEEDED),
        ignore_patterns=list(_BESIDE),
        **options,
    )
    return Path(found)


@contextmanager
def headers(model: Path | str) -> Iterator[Path]:
    """The directory of a model to look at: its own, or for a name one with config.json and shards that are all holes.

    Nothing of the weights is fetched: the hub is asked for the shards' headers by ranges of bytes. Where it is not to
    be reached, or not to be asked (HF_HUB_OFFLINE), a snapshot in its cache is looked at.

    Parameters
    ----------
    model : Path or str
        As for :func:`local`.

    Raises
    ------
    GlobeError
        If they cannot be fetched.
    """
    named = _named(model)
    if named is None:
        yield Path(model)
        return
    hub = _import_hub(model)
    with TemporaryDirectory(prefix="globe-headers-") as folder:
        try:
            _fetch_headers(hub, *named, Path(folder))
            found = Path(folder)
        except Exception as error:
            kept = _kept(hub, *named) if _status(error) is None else None
            if kept is None:
                raise _refused(model, error) from error
            found = kept
        yield found


def _fetch_headers(hub: Any, repository: str, revision: str | None, folder: Path) -> None:
    api = hub.HfApi(endpoint=_endpoint(), library_name="globe-moe")
    found = api.get_safetensors_metadata(repository, revision=revision)
    for name in ("config.json", _INDEX) if found.sharded else ("config.json",):
        shutil.copy(api.hf_hub_download(repository, name, revision=revision), folder / name)
    for name, metadata in found.files_metadata.items():
        _write_hollow(folder / name, metadata)


def _kept(hub: Any, repository: str, revision: str | None) -> Path | None:
    """A snapshot in the cache that has weights."""
    try:
        found = _snapshot(hub, repository, revision, local_files_only=True)
    except Exception:  # there is none
        return None
    return found if any(found.glob("*.safetensors")) else None


def _named(model: Path | str) -> tuple[str, str | None] | None:
    """The repository and the revision, if this is no path that is there."""
    match = _NAME.fullmatch(str(model))
    return None if match is None or os.path.lexists(model) else (match[1], match[2])


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _write_hollow(path: Path, metadata: Any) -> None:
    """A safetensors file of these tensors without their bytes."""
    entries = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in metadata.tensors.items()
    }
    raw = json.dumps({"__metadata__": dict(metadata.metadata), **entries}).encode()
    size = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)


def _import_hub(model: Path | str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        name = str(model).partition("/")[2]
        raise GlobeError(
            f"{model}: no such directory; if it is a name on the hub, install huggingface_hub (pip install "
            f'"globe-moe[hub]"), or fetch it with `hf download {model} --local-dir {name}` and give {name}'
        ) from error
    return huggingface_hub


def _status(error: Exception) -> int | None:
    """What the hub answered, where it did."""
    found: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return found


def _refused(model: Path | str, error: Exception) -> GlobeError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    status = _status(error)
    remedy = "check the name"
    if status in (401, 403):
        remedy = "check the name, and for a private or gated model run `hf auth login`"
    elif status is None:
        remedy = "check the name and the connection; what was fetched is kept and the same command goes on"
    told = lines[0] if lines else type(error).__name__
    return GlobeError(f"{model}: no such directory, and it could not be fetched from the hub ({told}); {remedy}")
