"""CONTRIBUTING tells the truth: its tree has every file of the service, its ways are functions, called in that order."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from service.config import AttentionConfig, ServiceConfig, UserConfig
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client, eventually
from tests.test_imports import modules

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WAYS = ("request", "switch", "scrape")
BY_RAY = ("service/app.py", "service/apply.py")
SHARED = {
    "Tokenizer": "the face's protocol of the model's class",
    "Choice": "an answer's choice: as it is built, and as the document states it",
    "ChatChoice": "the same of a conversation",
}
"""Names of two public classes of the service, and why."""
ALIKE = {"config": "a checkpoint's config.json, and the service's own file"}
"""Names of two modules, and why."""


def block(title: str) -> list[str]:
    """The lines of the code block under a heading."""
    found = re.search(rf"^## {title}\n.*?^```\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, f"CONTRIBUTING.md has no block under {title!r}"
    return found[1].splitlines()


def told() -> set[str]:
    """Files and folders of the service as the tree tells them; modules of a folder without their ending."""
    names, folder = set(), ""
    for line in block("The tree")[1:]:
        if entry := re.match(r"  (\w+)(\.py|/) ", line):
            folder = f"{entry[1]}/" if entry[2] == "/" else ""
            names.add(entry[1] + entry[2])
        if folder:
            names |= {f"{folder}{name}" for name in re.findall(r"(\w+) \(", line)}
    return names


def there() -> set[str]:
    """The same as they are on disk."""
    service, names = ROOT / "service", set()
    for path in service.iterdir():
        if path.name.startswith("__") or not (path.is_dir() or path.suffix == ".py"):
            continue
        names.add(path.name + "/" * path.is_dir())
        if path.is_dir():
            inside = [each for each in path.iterdir() if each.is_dir() or each.suffix == ".py"]
            names |= {f"{path.name}/{each.stem}" for each in inside if not each.name.startswith("__")}
    return names


def way(of: str) -> list[tuple[str, str]]:
    """(file, function) of each line of a way."""
    lines = [re.match(r"(\S+\.py): ([\w.]+)  +\S", line) for line in block(f"The way of a {of}")]
    assert all(lines), f"not file: function and what it does: {block(f'The way of a {of}')}"
    return [(line[1], line[2]) for line in lines if line]


def functions(file: str) -> Iterator[str]:
    """Every function of a file: methods behind their class, functions inside others by their own name."""

    def walk(node: ast.AST, owner: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield owner + child.name
            yield from walk(child, f"{child.name}." if isinstance(child, ast.ClassDef) else "")

    yield from walk(ast.parse((ROOT / file).read_text()), "")


def test_the_tree_has_every_name_under_service_and_no_other() -> None:
    assert told() == there()


@pytest.mark.parametrize("of", WAYS)
def test_every_function_of_a_way_exists(of: str) -> None:
    assert [(file, name) for file, name in way(of) if name not in functions(file)] == []


@contextmanager
def watched() -> Iterator[dict[tuple[str, str], None]]:
    """(file, function) of ours in the order of their first calls, on this thread and on all that begin within."""
    calls: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{ROOT}/"):
            calls.setdefault((code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname.rpartition("<locals>.")[2]))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


async def test_a_request_a_switch_and_a_scrape_go_the_ways_that_are_told() -> None:
    replica, gone = Replica(ServiceConfig(threads=1)), {}
    dense = AttentionConfig(default="dense", backends={"dense": {}})
    both = AttentionConfig(default="dense", backends={"dense": {}, "performer": {}})
    with watched() as calls:
        async with listening(replica, UserConfig(attention=dense)) as url:
            client = Client(url, replica)
            for of, go in (
                ("request", lambda: client.complete("import os").status == 200),
                ("scrape", lambda: client.get("/metrics").status == 200),
                ("switch", lambda: eventually(lambda: replica.readiness()["attention"] == both.model_dump())),
            ):
                calls.clear()
                if of == "switch":
                    replica.retarget(UserConfig(attention=both).model_dump())
                assert await asyncio.to_thread(go)
                gone[of] = list(calls)
    for of in WAYS:
        here = [step for step in way(of) if step[0] not in BY_RAY]
        assert [step for step in gone[of] if step in here] == here


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.stem for module, path in modules() if not module.startswith("attention"))
    assert {name for name, count in names.items() if count > 1 and not name.startswith("__")} <= ALIKE.keys()


def test_no_two_public_classes_of_the_service_have_one_name() -> None:
    trees = [ast.parse(path.read_text()) for module, path in modules() if module.startswith("service")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1 and not name.startswith("_")} <= SHARED.keys()
