"""The report in a real browser, where Chromium is: pictures at two widths, light and dark, and nothing cut off."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_tiny
from globe import Settings, compress, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (Debian: apt-get install chromium)"),
]
DARK, LIGHT = 0, 1

# Text that leaves its drawing, boxes wider than the page that nothing scrolls, and what the parser made of the tags.
PROBE = """
<script>
const cut = [];
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.viewBox.baseVal;
  for (const text of svg.querySelectorAll("text")) {
    const own = svg.getBoundingClientRect(), held = text.getBoundingClientRect();
    if (own.width && (held.left < own.left - 1 || held.right > own.right + 1 || held.bottom > own.bottom + 1))
      cut.push(text.textContent);
  }
}
document.body.dataset.found = JSON.stringify({
  cut, width: document.documentElement.scrollWidth, inner: innerWidth, svgs: document.querySelectorAll("svg").length,
  nested: document.querySelectorAll("b section, b figure, i figure, span figure, section section").length,
  small: [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)
    .filter(height => height > 0 && height < 9).length,
  back: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
});
</script>
"""

# A window is 500 pixels wide or more when the DOM is dumped; a frame within it can be narrower.
FRAME = """<!DOCTYPE html><html><body>
<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{framed}"
 onload="document.body.dataset.found = this.contentDocument.body.dataset.found"></iframe></body></html>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    source = make_tiny("qwen3_moe", place / "source")
    common: dict[str, Any] = {"rank": 0.5, "joint_steps": 10, "support": 3, "calibrate": "none", "device": "cpu"}
    compress(source, place / "one", Settings(**common, bank_size=6, families=("gate", "up", "down")))
    compress(source, place / "other", Settings(**common, bank_size=4, scope="layer"))
    two = report(place / "one", place / "other", output=place / "two.html")
    return {"one": place / "one" / "report.html", "two": two}


def browse(place: Path, page: Path, width: int, scheme: int, *options: str) -> tuple[str, str]:
    """Standard output, and what the page wrote on the console."""
    command = [
        CHROMIUM or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={place / 'profile'}", f"--window-size={width},2000", "--virtual-time-budget=2000",
        f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", "--v=0", *options,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(one for one in done.stderr.splitlines() if "CONSOLE" in one)


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", [DARK, LIGHT])
def test_the_page_in_a_browser(pages: dict[str, Path], tmp_path: Path, which: str, width: int, scheme: int) -> None:
    picture = tmp_path / "picture.png"
    _, console = browse(tmp_path, pages[which], width, scheme, f"--screenshot={picture}")
    assert console == ""
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (width, 2000)
    assert picture.stat().st_size > 50_000

    text = pages[which].read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*/>', text)
    assert policy is not None
    probed = tmp_path / "probed.html"
    opened = text.replace(policy[0], "").replace("<details>", '<details open="">')
    framed = html.escape(opened.replace("</body>", PROBE + "</body>"))
    probed.write_text(FRAME.format(width=width, framed=framed), encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', browse(tmp_path, probed, width, scheme, "--dump-dom")[0])
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["cut"] == [] and seen["small"] == 0 and seen["nested"] == 0
    assert seen["width"] <= seen["inner"] == width
    assert seen["svgs"] == text.count("<svg")
    dark = scheme == DARK
    assert (sum(map(int, re.findall(r"\d+", seen["back"]))) < 200) is dark
    assert (sum(map(int, re.findall(r"\d+", seen["ink"]))) > 600) is dark


def test_the_page_runs_no_script(pages: dict[str, Path], tmp_path: Path) -> None:
    """The page's own policy stops what it does not hold anyway; the console is indeed read."""
    probed = tmp_path / "probed.html"
    text = pages["one"].read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    probed.write_text(text, encoding="utf-8")
    dom, console = browse(tmp_path, probed, 1280, LIGHT, "--dump-dom")
    assert "data-found" not in dom and "Content Security Policy" in console
