"""What the loop's parts share: made once at the start, never replaced."""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import structlog
from opentelemetry.trace import Span

from forepage.coldpool.client import PublishedRecord, SlotRef
from forepage.kv.geometry import KvGeometry
from forepage.rpc import index_pb2
from forepage.settings import WorkerSettings
from forepage.telemetry import Telemetry
from forepage.worker.arena_access import Grant, GrantRequest
from forepage.worker.device import Device
from forepage.worker.gpu_blocks import GpuBlocks


class ArenaPort(Protocol):
    """What the loop needs of the cold pool; `ArenaAccess` over gRPC, tests bring one in memory."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_leases(self) -> int: ...
    def grant(self, request: GrantRequest, span: Span) -> Future[Grant]: ...
    def publish(self, records: Seq[PublishedRecord], span: Span) -> Future[list[SlotRef]]: ...
    def release(self, refs: Seq[SlotRef], span: Span | None) -> Future[None]: ...
    def matches(self, ref: SlotRef) -> bool: ...
    def offset(self, ref: SlotRef) -> int: ...


class IndexPort(Protocol):
    """What the loop needs of the lookahead index; `IndexClient` over gRPC, tests bring a scripted one."""

    def ask(self, request: index_pb2.LookaheadRequest) -> bool: ...


GPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 4096, 512


@dataclass(frozen=True)
class WorkerParts:
    """One worker's settings, device, memory accounts and peers."""

    settings: WorkerSettings
    geometry: KvGeometry
    topk: int
    device: Device
    blocks: GpuBlocks
    arena: ArenaPort
    index: IndexPort
    telemetry: Telemetry
    log: structlog.stdlib.BoundLogger

    @property
    def ahead_steps(self) -> int:
        """Decode steps launched before the tokens of the last one are read."""
        asked = self.settings.ahead_steps
        return int(self.device.may_run_ahead) if asked is None else asked

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prefill step: on a GPU many, since one of few takes as long to launch."""
        by_device = GPU_CHUNK_TOKENS if self.device.kind.type == "cuda" else CPU_CHUNK_TOKENS
        return self.settings.prefill_chunk_tokens or by_device

    @property
    def resume_parts(self) -> int:
        """Arena slots of one resume record."""
        return -(-self.geometry.resume_bytes // self.geometry.slot_bytes)

    @property
    def recent_blocks(self) -> int:
        """Most blocks that are always resident: the tail, its two ragged ends, and a late commit's growth."""
        return -(-self.settings.recent_tokens // self.geometry.block_tokens) + 4
