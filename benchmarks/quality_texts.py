"""The texts that quality.py judges on: of several kinds, none of which a calibration reads.

    python benchmarks/quality_texts.py FOLDER      # writes them as FOLDER/NAME.txt, for globe eval --text

What a machine lacks is left out and said: the licences are Debian's, the docstrings are SciPy's, the code is that of
the installed click. A text of prose is one's own, given by `--text`: Debian's dictionaries are such texts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from globe.statistics.texts import evaluation_text

LICENCES = Path("/usr/share/common-licenses")
_LICENCES = ("Artistic", "GPL-2", "MPL-2.0", "LGPL-3")


def texts() -> dict[str, str]:
    """The texts of this machine by their names, empty where it lacks one."""
    makers: dict[str, Callable[[], str]] = {
        "help topics": lambda: evaluation_text("evaluation"),
        "docstrings": docstrings,
        "licences": licences,
        "code": code,
    }
    return {name: make() for name, make in makers.items()}


def docstrings() -> str:
    """Of the functions of scipy.linalg and scipy.optimize."""
    import scipy.linalg
    import scipy.optimize

    functions = [each for module in (scipy.linalg, scipy.optimize) for each in vars(module).values()]
    found = [inspect.getdoc(each) for each in functions if inspect.isfunction(each)]
    return "\n\n".join(filter(None, found))


def licences(folder: Path = LICENCES) -> str:
    """Those that Debian installs, as far as they are there."""
    files = [folder / name for name in _LICENCES]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def code() -> str:
    """The sources of click."""
    import click

    files = sorted(Path(click.__file__).parent.glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def main(folder: Path) -> None:
    """Write the texts of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        if text:
            (folder / f"{name.replace(' ', '-')}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} characters" if text else f"{name}: not on this machine")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
