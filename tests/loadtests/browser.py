"""A page looked at in headless Chromium: laid out at a width, in light or dark, and asked what a reader would stumble over."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

WIDTHS = (1280, 380)  # CSS pixels: a desk and a telephone

# In iframes, for a window of Chromium's has a least width. What is found stands in the title of the page around them.
AROUND = '<!doctype html><meta name="color-scheme" content="light dark"><title>not looked at</title><body>{}<script>{}</script>'
SCRIPT = Path(__file__).with_name("look.js").read_text()
FRAME = '<iframe style="border:0;display:block;width:{width}px;height:4000px" srcdoc="{page}"></iframe>'


def look(page: str, dark: bool = False) -> list[dict[str, Any]]:
    """What is wrong with a page at each of WIDTHS: `found` lists width, kind and words; `texts` counts what was looked at."""
    frames = "".join(FRAME.format(width=width, page=html.escape(page)) for width in WIDTHS)
    dump = _chromium(AROUND.format(frames, SCRIPT), dark, "--dump-dom", "--window-size=1400,900")
    title = re.search(r"<title>(.*?)</title>", dump, re.S)
    assert title and title[1].startswith("["), "Chromium did not come to the end of the page"
    seen: list[dict[str, Any]] = json.loads(html.unescape(title[1]))
    return seen


def picture(page: str, path: Path, width: int, height: int, dark: bool) -> None:
    """A picture of the page, for people."""
    _chromium(page, dark, f"--screenshot={path}", f"--window-size={width},{height}")


def _chromium(page: str, dark: bool, *flags: str) -> str:
    assert CHROMIUM is not None, "tests that call this are skipped without Chromium"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page)
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", scheme, *flags]
        return subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
