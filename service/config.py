"""Every knob of the service, typed. An unknown key or a value out of range is refused at start-up, named in the message."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(Settings):
    """How the engine batches, admits and queues (service/engine)."""

    memory_budget_bytes: int | None = Field(default=None, gt=0)  # None: memory_share of what is left after the weights
    memory_share: float = Field(default=0.5, gt=0, le=1)
