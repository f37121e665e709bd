"""The page under /docs is whole without a network, and shows every route and its fields in a real browser."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

from tests.http.bad_requests import POSTS
from tests.http.client import Client
from tests.loadtests.browser import CHROMIUM, FLAGS, needs_chromium

ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
LINK = re.compile(r"""(?:src|href)="([^"]+)"|url: '([^']+)'""")


def test_the_page_names_no_other_host_and_all_it_names_is_there(service: Client) -> None:
    page = service.get("/docs")
    links = [src or url for src, url in LINK.findall(page.text)]
    assert len(links) >= 4
    for link in links:
        assert "//" not in link and not link.startswith("/"), "relative links hold below any prefix"
        found = service.send("GET", f"/{link}", raw=True)
        assert found.status == 200, link
    assert "default-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["x", "..%2f__init__.py", "%2e%2e/core.py", "redoc.standalone.js", "swagger-ui.css/x"])
def test_nothing_else_of_the_package_is_served(service: Client, name: str) -> None:
    assert (service.get(f"/docs/{name}").status, service.get(f"/docs/{name}").error["code"]) == (404, "not_found")


@needs_chromium
def test_a_browser_without_a_network_shows_every_route(service: Client, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, ALONE, f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom"]
    made = subprocess.run([*command, f"{service.url}/docs"], capture_output=True, text=True, timeout=120, check=True)
    shown = html.unescape(re.sub(r"<[^>]+>|\u200b", "", made.stdout))
    assert "Failed to load" not in shown and "No operations defined" not in shown
    missing = [path for path in (*POSTS, "/v1/models", "/health", "/metrics") if path not in shown]
    assert missing == []
    assert "Long inputs under switchable attention." in shown
