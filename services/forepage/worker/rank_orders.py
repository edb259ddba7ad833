"""What rank 0 tells a follower's process at its start: one line of JSON on its standard input."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from forepage.settings import ModelSettings, TelemetrySettings, WorkerSettings

HERE, READY = "here", "ready"
"""What a follower says: it may be met; its model is loaded."""
GO = "go"
"""What rank 0 says after the orders: every rank is ready, follow."""


class RankOrders(BaseModel):
    """Which rank this is, where the others meet, which arena they share, and rank 0's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    store_path: Path
    arena_path: Path
    arena_uuid: str
    worker: WorkerSettings
    model: ModelSettings
    telemetry: TelemetrySettings
