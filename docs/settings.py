"""Write docs/settings.md from the docstring of `globe.Settings`: `python docs/settings.py`."""

import dataclasses
import re
from pathlib import Path

from globe.settings import Settings

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every key of `globe compress --config FILE.yaml` and of `globe.Settings`; options of the command line win.

| key | type or values | default | meaning |
| --- | --- | --- | --- |
"""


def settings_page():
    """Return the page: a line for every setting, in the order of the docstring."""
    text = Settings.__doc__.partition("----------\n")[2]
    told = re.findall(r"^ *(\w+) : (.*)\n((?:^ {8,}.*\n)+)", text, re.MULTILINE)
    meanings = {name: (kind.replace("|", r"\|"), " ".join(meaning.split())) for name, kind, meaning in told}
    lines = []
    for field in dataclasses.fields(Settings):
        default = field.default
        shown = "not given" if default is None else ",".join(default) if isinstance(default, tuple) else str(default)
        kind, meaning = meanings[field.name]
        lines.append(f"| `{field.name}` | {kind} | `{shown}` | {meaning} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
