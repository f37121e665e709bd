"""What an operator can do wrong, as typed errors: each ends the command with its message and status 2, never a traceback."""

from __future__ import annotations


class LoadTestError(Exception):
    """The command cannot do what it was asked; the message says why and what helps."""


class ScenarioError(LoadTestError):
    """A scenario, trace or other input file that does not say what it must."""


class TargetError(LoadTestError):
    """The server cannot be measured: unreachable, not ready, or without what the scenario asks for."""
