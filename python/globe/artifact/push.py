"""Upload a factored directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globe.errors import GlobeError, UsageError

_HIDDEN = ".*"  # the run's folder, locks, partial files; also those in hidden folders, as * matches a slash


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload experts factored by GloBE",
    endpoint: str | None = None,
) -> str:
    """Upload all files of a factored directory, hidden ones excepted, to a model repository, in one commit.

    The repository and the branch are made if they are not there. The token is the hub's own: HF_TOKEN, or what
    `hf auth login` has stored.

    Parameters
    ----------
    directory : str or Path
        Written by `globe compress`.
    repo : str
        NAMESPACE/NAME.
    private : bool
        Visibility of a repository that is made here.
    revision : str, optional
        A branch; main if not given.
    message : str
        Of the commit.
    endpoint : str, optional
        Address of another hub; HF_ENDPOINT or https://huggingface.co if not given.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    UsageError
        If `repo` is no name of a repository.
    GlobeError
        If the directory is not a whole factored one, huggingface_hub is missing, or the hub refuses.
    """
    directory = Path(directory)
    hub = _import_hub()
    from globe.artifact.factored import open_factored

    open_factored(directory)
    if (directory / ".globe-lock").exists():
        raise GlobeError(f"{directory}: a run is writing there; wait for it")
    try:
        api = hub.HfApi(endpoint=endpoint, library_name="globe-moe")
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=directory, revision=revision, commit_message=message, ignore_patterns=_HIDDEN
        )
    except hub.errors.HFValidationError as error:
        raise UsageError(f"repository {repo!r}: {_first_line(error)}; expected NAMESPACE/NAME") from error
    except Exception as error:  # the hub's, the HTTP client's and hf_xet's
        raise _refused(hub, repo, error) from error
    return str(done.commit_url)


def _refused(hub: Any, repo: str, error: Exception) -> GlobeError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, hub.errors.LocalTokenNotFoundError) or status == 401:
        return GlobeError(f"{repo}: the hub knows no token of yours; set HF_TOKEN or run `hf auth login`")
    if status == 403:
        return GlobeError(f"{repo}: your token may not write there; use one with write access, or another namespace")
    if status is not None:
        return GlobeError(f"{repo}: the hub answers {status}: {_first_line(error)}")
    return GlobeError(f"{repo}: the upload failed: {_first_line(error)}; the same command uploads what is missing")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise GlobeError('globe push needs huggingface_hub: pip install "globe-moe[hub]"') from error
    return huggingface_hub
