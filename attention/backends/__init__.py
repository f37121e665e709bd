"""The backends there are: one file is one backend, and nothing registers it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from attention.interface import AttentionBackend


@cache
def names() -> tuple[str, ...]:
    """The names of the files here, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def named(name: str) -> type[AttentionBackend]:
    """The backend class of a file here, one of `names()`."""
    module = importlib.import_module(f"attention.backends.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, AttentionBackend) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"attention/backends/{name}.py must define one backend, it defines {found}"
    return found[0]
