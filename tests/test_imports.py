"""The direction of imports: attention <- model <- engine <- http <- the composition; loadtests beside all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("attention", "service", "loadtests")

ALLOWED: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "service.model": ("attention", "service.model"),
    "service.engine": (
        "attention",
        "service.model",
        "service.engine",
        "service.config",
        "service.machine",
        "service.threads",
        "service.timing",
    ),
    "service.http": ("service.engine.request", "service.http", "service.config", "service.exposition", "service.timing"),
    "service.http.worker": ("service.engine.request", "service.http", "service.model.tokenizer"),  # a process of its own
    "service.timing": (),
    "service.machine": (),
    "service.threads": (),
    "service.config": ("attention",),
    "service.exposition": (),
    "service.logs": (),
    "service.metrics": ("service.engine.observer", "service.engine.request", "service.timing"),
    "service.tracing": ("service.engine.observer", "service.engine.request"),
    "loadtests": ("loadtests",),
}
"""What of ours a package may import at run time."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "ray": ("service.app", "service.cluster"),
    "torch": (
        "attention",
        "service.model",
        "service.engine",
        "service.training",
        "service.replica",
        "service.machine",
        "service.threads",
        "service.benchmark",
    ),
    "fastapi": ("service.http",),
    "starlette": ("service.http", "service.replica", "service.app"),
}
"""Where a library of others may be imported."""


def modules() -> Iterator[tuple[str, Path]]:
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports at run time: those below `if TYPE_CHECKING` serve the checker only."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def law_of(module: str) -> tuple[str, ...] | None:
    found = [package for package in ALLOWED if is_within(module, package)]
    return ALLOWED[max(found, key=len)] if found else None


def breaches(module: str, path: Path) -> list[str]:
    law = law_of(module)
    found = []
    for name in imports(path):
        ours = any(is_within(name, package) for package in OURS)
        if ours and law is not None and not any(is_within(name, package) for package in (*law, module)):
            found.append(f"{module} imports {name}, allowed: {', '.join(law) or 'nothing of ours'}")
        home = FOREIGN.get(name.partition(".")[0])
        if home is not None and not any(is_within(module, package) for package in home):
            found.append(f"{module} imports {name}, which only {', '.join(home)} may")
    return found


def test_every_import_runs_the_one_way() -> None:
    assert [breach for module, path in modules() for breach in breaches(module, path)] == []


def test_there_are_modules_to_judge() -> None:
    assert {"attention.interface", "service.engine.engine", "service.http.routes", "service.app"} <= {
        name for name, _ in modules()
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attention.blocks", "import service.config"),
        ("service.model.transformer", "from service.engine import engine"),
        ("service.engine.engine", "from service.http.routes import create_app"),
        ("service.http.routes", "def f():\n    import torch"),
        ("service.http.routes", "from service.engine.engine import Engine"),
        ("service.replica", "from ray import serve"),
        ("loadtests.client", "from service.config import ServeFile"),
    ],
)
def test_a_breach_is_found(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "breach.py"
    path.write_text(source)
    assert breaches(module, path)
