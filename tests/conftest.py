"""What holds for all tests: generated examples have no time limit, for speed is measured in benchmarks."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
