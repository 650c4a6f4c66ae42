"""One page that shows what a compression did: `globe report`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from globe.checkpoint.companions import REPORT
from globe.checkpoint.tensorfile import write_text
from globe.errors import GlobeError, UsageError
from globe.report.data import read_run
from globe.report.judged import write_card
from globe.report.page import render


def report(out_dir: Path | str, other: Path | str | None = None, *, output: Path | str | None = None) -> Path:
    """Write one self-contained HTML page about a finished output, or about two side by side.

    What `globe eval` left in the output's evaluation.json is drawn, and stands in its model card from then on.

    Parameters
    ----------
    out_dir : Path or str
        A directory written by `compress`.
    other : Path or str, optional
        A second one, to lay beside it.
    output : Path or str, optional
        The page, named .html; report.html in `out_dir` if not given.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    UsageError
        If `output` is not named .html, or is a directory.
    GlobeError
        If a directory is no finished output, or the page cannot be written.
    """
    directory = Path(out_dir)
    target = Path(output) if output is not None else directory / REPORT
    if target.suffix.lower() != ".html":
        raise UsageError(f"report {target}: expected a name that ends in .html")
    if target.is_dir():
        raise UsageError(f"report {target} is a directory; name a file")
    runs = [read_run(directory)] + ([read_run(Path(other))] if other is not None else [])
    page = render(runs)
    try:
        write_text(target, page)
    except OSError as error:
        with suppress(OSError):
            target.with_name(f".{target.name}.partial").unlink(missing_ok=True)
        raise GlobeError(f"report {target}: cannot be written ({error.strerror}); name another with --output") from None
    try:
        write_card(directory, runs[0].judged)
    except (OSError, UnicodeDecodeError) as error:
        raise GlobeError(f"{directory}: its model card (README.md) cannot be rewritten ({error})") from None
    return target
