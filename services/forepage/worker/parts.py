"""What the loop's parts share: made once at the start, never replaced."""

from dataclasses import dataclass

import structlog

from forepage.kv.geometry import KvGeometry
from forepage.model.transformer import Transformer
from forepage.settings import WorkerSettings
from forepage.telemetry import Telemetry
from forepage.worker.arena_access import ArenaAccess
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.gpu_blocks import GpuBlocks
from forepage.worker.index_client import IndexClient


@dataclass(frozen=True)
class WorkerParts:
    """One worker's settings, model, memory and peers."""

    settings: WorkerSettings
    geometry: KvGeometry
    topk: int
    model: Transformer
    blocks: GpuBlocks
    copies: CopyEngine
    arena: ArenaAccess
    index: IndexClient
    telemetry: Telemetry
    log: structlog.stdlib.BoundLogger

    @property
    def resume_parts(self) -> int:
        """Arena slots of one resume record."""
        return -(-self.geometry.resume_bytes // self.geometry.slot_bytes)

    @property
    def recent_blocks(self) -> int:
        """Most blocks that are always resident: the tail, its two ragged ends, and a late commit's growth."""
        return -(-self.settings.recent_tokens // self.geometry.block_tokens) + 4
