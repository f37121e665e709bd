"""A replica on paper whose laws are stated, not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from service.capacity.site import Site, Surroundings
from service.config import EngineConfig
from service.engine.allowlist import paced
from service.engine.forecast import Ramp
from tests.engine import world

MODEL = world.make_model()
BACKENDS = world.make_backends(MODEL)
TOKENIZER = world.make_tokenizer()
CHUNK = 128
BUDGET = 1 << 30
PACES = Ramp(1e-3, 1e-4), Ramp(1e-3, 1e-4)
LINES = [Ramp(0.0, 1e-9)] * 3


def make_site(budget: int = BUDGET, packs: bool = True, around: Surroundings | None = None, **config: Any) -> Site:
    lanes = {
        name: paced(name, backend, MODEL, PACES, LINES, CHUNK, budget)
        for name, backend in BACKENDS.by_name.items()
        if name != "performer"
    }
    return Site(
        lanes=lanes,
        rules=replace(BACKENDS, by_name={name: BACKENDS.by_name[name] for name in lanes}, default="dense"),
        config=EngineConfig(chunk_tokens=CHUNK, prefix_share=0.0, **config),
        budget=budget,
        packs=packs,
        vocab_size=world.VOCABULARY,
        max_length=world.MAX_LENGTH,
        tasks=MODEL.config.tasks,
        tokenizer=TOKENIZER,
        threads=1,
        cpus=1,
        around=around or Surroundings(),
    )
