"""Write docs/settings.md from the docstring of `globe.Settings`: `python docs/settings.py`."""

import dataclasses
import re
from pathlib import Path

from globe.settings import Settings

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every key of `globe compress --config FILE.yaml` and of `globe.Settings`; options of the command line win.

| key | default | meaning |
| --- | --- | --- |
"""


def settings_page():
    """Return the page: a line for every setting, in the order of the docstring."""
    text = Settings.__doc__.partition("----------\n")[2]
    meanings = dict(re.findall(r"^ *(\w+) : .*\n((?:^ {8,}.*\n)+)", re.sub(r"(?m)^ {4}", "    ", text), re.MULTILINE))
    lines = []
    for field in dataclasses.fields(Settings):
        default = field.default
        shown = "not given" if default is None else ",".join(default) if isinstance(default, tuple) else str(default)
        lines.append(f"| `{field.name}` | `{shown}` | {' '.join(meanings[field.name].split())} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
