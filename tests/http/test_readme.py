"""The README's commands do what it says, and leave no file behind."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.http.client import Client

PAGE = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = [block for block in re.findall(r"^```\n(.*?)^```", PAGE, re.S | re.M) if "curl" in block and ":8000/" in block]


def run(block: str, service: Client, folder: Path) -> str:
    """What the commands of a block print, without those that need an installed service."""
    lines = [line for line in block.splitlines() if not line.startswith(".venv/")]
    script = "\n".join(lines).replace("http://127.0.0.1:8000", service.url).replace("curl ", "curl -sS ")
    return subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, text=True, timeout=300, check=True).stdout


def test_there_are_commands_for_every_way_to_ask() -> None:
    assert {
        path for path in ("completions", "embeddings", "chat/completions", "plan") if f"/v1/{path} " in "".join(BLOCKS)
    } == {*("completions", "embeddings", "chat/completions", "plan")}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_command_gets_an_answer_and_leaves_no_file(service: Client, block: str, tmp_path: Path) -> None:
    told = run(block, service, tmp_path)
    assert '"error"' not in told
    assert re.search(r'"(text|content|embedding|verdict)": ?', told)
    assert list(tmp_path.iterdir()) == []


def test_the_pair_that_the_readme_tells_of_is_recalled_by_dense_alone(service: Client, tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "# recall:" in block]
    texts = [json.loads(line)["choices"][0]["text"].strip() for line in run(block, service, tmp_path).splitlines() if line]
    assert texts[0] == "saffron_ridge"
    assert "saffron_ridge" not in texts[1:]
