"""The direction of imports: attention <- model <- engine <- http <- the composition; loadtests beside all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import attention

ROOT = Path(__file__).parent.parent
OURS = ("attention", "service", "loadtests")

ALLOWED: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "loadtests": ("loadtests",),
    "service": (),  # what has no line of its own imports nothing of ours
    "service.child": (),
    "service.difference": (),
    "service.exposition": (),
    "service.logs": (),
    "service.machine": (),
    "service.threads": (),
    "service.timing": (),
    "service.config": ("attention",),
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
    "service.http.worker": ("service.engine.request", "service.http", "service.model"),  # a process of its own
    "service.metrics": ("service.engine.observer", "service.engine.request", "service.timing"),
    "service.tracing": ("service.engine.observer", "service.engine.request"),
    "service.switch": ("attention", "service.engine.engine", "service.config", "service.metrics", "service.threads"),
    "service.replica": (
        "service.engine.engine",
        "service.http",
        "service.model",
        "service.config",
        "service.exposition",
        "service.logs",
        "service.machine",
        "service.metrics",
        "service.routing",
        "service.switch",
        "service.threads",
        "service.tracing",
    ),
    "service.plain": ("service.config", "service.http.line", "service.replica"),
    "service.scaling": (),
    "service.app": (
        "service.config",
        "service.exposition",
        "service.logs",
        "service.machine",
        "service.replica",
        "service.routing",
        "service.scaling",
        "service.switch",
    ),
    "service.router": ("service.http.beginning", "service.http.tickets", "service.routing"),
    "service.routing": ("service.engine.ahead",),
    "service.cluster": ("service.asking", "service.child", "service.config", "service.http.proxy", "service.scratch"),
    "service.scratch": ("service.config",),
    "service.asking": ("service.config",),
    "service.apply": ("service.asking", "service.cluster", "service.config", "service.difference", "service.survey"),
    "service.cli": (
        "service.apply",
        "service.asking",
        "service.capacity.command",
        "service.child",
        "service.cluster",
        "service.config",
        "service.convert",
        "service.machine",
        "service.model.files",
        "service.scratch",
        "service.survey",
    ),
    "service.capacity": (
        "attention",
        "service.asking",
        "service.capacity",
        "service.config",
        "service.engine",
        "service.machine",
        "service.model",
        "service.replica",
        "service.routing",
    ),
    "service.survey": ("attention", "service.engine.allowlist", "service.model", "service.config"),
    "service.convert": ("attention", "service.model"),
    "service.training": ("attention", "service.model", "service.training", "service.config"),
    "service.benchmark": (
        "attention",
        "service.model",
        "service.engine",
        "service.benchmark",
        "service.config",
        "service.machine",
        "service.threads",
        "service.training.corpus",
    ),
}
"""What of ours a package may import at run time; the longest name that fits is the one that counts."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "ray": ("service.app", "service.cluster", "service.router"),
    "torch": (
        "attention",
        "service.model",
        "service.engine",
        "service.training",
        "service.benchmark",
        "service.convert",
        "service.replica",
        "service.machine",
        "service.threads",
    ),
    "fastapi": ("service.http",),
    "simpy": ("service.capacity",),
    "starlette": ("service.http", "service.replica", "service.app"),
}
"""Where a library of others may be imported."""

FACE = {f"attention.{name}" for name in (*attention.__all__, "truth")}
"""What others take from attention: its face, and the check of what is served."""

PAST_THE_FACE = {
    ("service.training.gradients", "attention.projection"): "trains with the rows that the backend draws",
    ("service.model.native", "attention.kernels.library"): "its C is loaded, checked and called as that of attention",
    ("service.model.encoder_layer", "attention.kernels.library"): "likewise",
}


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


def past_the_face(module: str, path: Path) -> list[str]:
    """What a module outside attention takes from behind its face, but for what is told above."""
    taken = [name for name in imports(path) if is_within(name, "attention") and name not in {"attention", *FACE}]
    told = [past for who, past in PAST_THE_FACE if who == module]
    return [name for name in taken if not any(is_within(name, past) for past in told)]


def graph() -> dict[str, set[str]]:
    """Which module imports which at run time."""
    known = dict(modules())

    def module_of(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    return {module: {found for name in imports(path) if (found := module_of(name))} for module, path in known.items()}


def test_nobody_outside_attention_reaches_past_its_face() -> None:
    outside = [(module, path) for module, path in modules() if not is_within(module, "attention")]
    assert {module: found for module, path in outside if (found := past_the_face(module, path))} == {}


def test_what_may_reach_past_the_face_of_attention_still_does() -> None:
    paths = dict(modules())
    known = {module: list(imports(path)) for module, path in paths.items()}
    told = [(module, past) for module, past in PAST_THE_FACE if not any(is_within(name, past) for name in known[module])]
    assert told == []


def test_imports_run_in_no_circle() -> None:
    left = {module: needs - {module} for module, needs in graph().items() if is_within(module, "service")}
    while ready := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}


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
        ("service.switch", "from service.http.routes import create_app"),
        ("service.cli", "from service.replica import Replica"),
        ("service.plain", "from service.engine.engine import Engine"),
        ("service.training.train", "from service.engine.engine import Engine"),
        ("service.anything_new", "from service.config import ServeFile"),
        ("loadtests.client", "from service.config import ServeFile"),
    ],
)
def test_a_breach_is_found(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "breach.py"
    path.write_text(source)
    assert breaches(module, path)


@pytest.mark.parametrize(
    "source", ["import attention.backends.dense", "from attention.interface import Parts", "from attention import blocks"]
)
def test_a_look_behind_the_face_of_attention_is_found(source: str, tmp_path: Path) -> None:
    path = tmp_path / "breach.py"
    path.write_text(f"import attention\nfrom attention import AttentionBackend, truth\n{source}")
    assert len(past_the_face("service.engine.runner", path)) == 1
