"""Texts that every Python installation carries: its help topics, its library's sources, its licence."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from globe.statistics.documents import Document, half_of

PARTS = ("topics", "sources", "licence")
# of no use (tables, tests, other packages), or read already (the help topics)
_LEFT_OUT = frozenset(
    "test tests idlelib lib2to3 turtledemo ensurepip encodings pydoc_data site-packages dist-packages __pycache__ "
    "lib-dynload".split()
)
_MOST_BYTES = 1 << 20  # of a file


def python_documents(part: str, half: str) -> list[Document]:
    """One half of a part of what Python carries; empty where this installation lacks it.

    Parameters
    ----------
    part : str
        ``topics``, the language reference of `help()`, cut in the middle; ``sources``, the standard library's files,
        in halves by the hash of their names; ``licence``, cut in the middle.
    half : str
        ``calibration`` or ``evaluation``.
    """
    readers: dict[str, Callable[[], list[Document]]] = {"topics": _topics, "sources": _sources, "licence": _licence}
    found = readers[part]()
    return half_of(found, half) if found else []


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document("topics", "\n\n".join(topics[key] for key in sorted(topics)))]


@cache
def _sources() -> list[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in _files(library):
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # some are in other encodings
        if content.strip():
            found.append(Document(file.relative_to(library).as_posix(), content))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in _LEFT_OUT or path.name.startswith("."):
            continue
        if path.is_dir() and (path / "__init__.py").is_file():
            yield from _files(path)
        elif path.suffix == ".py" and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            yield path


def _licence() -> list[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    for folder in (library, library.parent, library.parent.parent):
        for name in ("LICENSE.txt", "LICENSE"):
            try:
                return [Document("licence", (folder / name).read_text(encoding="utf-8"))]
            except (OSError, UnicodeDecodeError):
                continue
    return []
