"""What becomes of every architecture, as docs/architectures.md says: `python tests/table_of_architectures.py [TYPE …]`.

With types named only their lines are made anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from judged import STEPS, Judged

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
_HEAD = "| model_type | layout | " + " | ".join(STEPS) + " | why not |\n"


def rows(found: Iterable[Judged]) -> list[str]:
    """The lines of the table."""
    lines = []
    for each in found:
        marks = ["yes" if step in each.works else "" for step in STEPS]
        lines.append(f"| {each.model_type} | {each.layout} | {' | '.join(marks)} | {each.why.replace('|', '/')} |")
    return lines


def written() -> list[str]:
    """The lines of the table that the page has."""
    text = PAGE.read_text(encoding="utf-8").partition(_HEAD)[2]
    return [line for line in text.splitlines()[1:] if line.startswith("|")]


def main(names: list[str]) -> None:
    """Judge them all, or those that are named."""
    from architectures import model_types

    known = {line.split("|")[1].strip(): line for line in written()} if names else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or model_types():
            known[name] = rows([judge_one(name, Path(folder))])[0]
    lines = [known[name] for name in sorted(known)]
    marks = [[cell.strip() for cell in line.split("|")[3:7]] for line in lines]
    counts = ", ".join(f"{sum(mark[n] == 'yes' for mark in marks)} {step}" for n, step in enumerate(STEPS))
    before = PAGE.read_text(encoding="utf-8").partition(_HEAD)[0] if PAGE.exists() else "# Architectures\n\n"
    head, _, _ = before.partition("Of the ")
    text = f"{head}Of the {len(lines)}: {counts}.\n\n{_HEAD}{'| --- ' * (len(STEPS) + 3)}|\n" + "\n".join(lines) + "\n"
    PAGE.write_text(text, encoding="utf-8")


def judge_one(name: str, folder: Path) -> Judged:
    """One of them, told as it is done."""
    from judged import judge

    found = judge(name, folder / name)
    print(name, *found.works, found.why, flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
