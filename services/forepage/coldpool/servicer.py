"""The gRPC edge of the cold pool: messages in, values to the pool, typed errors out, a span for each verb."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog
from opentelemetry.trace import Span, SpanKind

from forepage.coldpool.holders import HolderRegistry
from forepage.coldpool.pool import ColdPool
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.wire import (
    block_keys_from_wire,
    records_from_wire,
    refs_from_wire,
    refs_to_wire,
    resume_keys_from_wire,
)
from forepage.errors import ForepageError, ModelFormatError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.coldpool_pb2_grpc import ColdPoolServicer
from forepage.rpc.edge import abort, metadata_of
from forepage.telemetry import SpanName, Telemetry, set_attributes
from forepage.trace_context import incoming_context

Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")
_log = structlog.get_logger("forepage.coldpool")


class ArenaLeases(ColdPoolServicer):
    """Serves one pool; holds no state of its own but the epoch."""

    def __init__(self, pool: ColdPool, holders: HolderRegistry, *, epoch: str, telemetry: Telemetry) -> None:
        self._pool = pool
        self._holders = holders
        self._epoch = epoch
        self._telemetry = telemetry

    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachReply:  # noqa: N802
        """See coldpool.proto; an empty holder id only asks where the arena is."""
        return await _typed(context, self._attach(request))

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveReply:  # noqa: N802
        """See coldpool.proto."""
        return await self._traced(
            SpanName.COLDPOOL_RESERVE, context, lambda span: self._reserve(request, span)
        )

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishReply:  # noqa: N802
        """See coldpool.proto."""
        return await self._traced(
            SpanName.COLDPOOL_PUBLISH, context, lambda span: self._publish(request, span)
        )

    async def LeasePrefix(  # noqa: N802
        self, request: pb.LeasePrefixRequest, context: Context
    ) -> pb.LeasePrefixReply:
        """See coldpool.proto."""
        return await self._traced(
            SpanName.COLDPOOL_LEASE, context, lambda span: self._lease_prefix(request, span)
        )

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:  # noqa: N802
        """See coldpool.proto."""
        return await self._traced(
            SpanName.COLDPOOL_RELEASE, context, lambda span: self._release(request, span)
        )

    async def Announce(self, request: pb.AnnounceRequest, context: Context) -> pb.AnnounceReply:  # noqa: N802
        """See coldpool.proto."""
        return await _typed(context, self._announce(request))

    async def Stat(self, _: pb.StatRequest, context: Context) -> pb.StatReply:  # noqa: N802
        """See coldpool.proto."""
        return await _typed(context, self._stat())

    async def _attach(self, request: pb.AttachRequest) -> pb.AttachReply:
        shape = self._pool.arena.shape
        if request.slot_bytes != shape.slot_bytes:
            raise ModelFormatError(
                f"the arena's slots have {shape.slot_bytes} bytes, {request.holder_id or 'the caller'} wants "
                f"{request.slot_bytes}; start all processes with the same FOREPAGE_MODEL__* settings"
            )
        if request.holder_id:
            holder = HolderId(request.holder_id)
            if self._holders.attach(holder):
                self._pool.drop_holder(holder)
            self._pool.add_holder(holder)
        return pb.AttachReply(
            arena_path=str(self._pool.arena.path),
            arena_uuid=shape.uuid,
            slot_bytes=shape.slot_bytes,
            num_slots=shape.num_slots,
            payload_offset=shape.payload_offset,
            manager_epoch=self._epoch,
        )

    async def _reserve(self, request: pb.ReserveRequest, span: Span) -> pb.ReserveReply:
        set_attributes(span, num_blocks=request.count)
        if not 0 < request.count <= self._pool.arena.num_slots:
            raise RequestError(f"count {request.count}: 1 to {self._pool.arena.num_slots} slots", "count")
        refs = await self._pool.reserve(HolderId(request.holder_id), request.count)
        return pb.ReserveReply(slots=refs_to_wire(refs))

    async def _publish(self, request: pb.PublishRequest, span: Span) -> pb.PublishReply:
        set_attributes(span, num_blocks=len(request.records))
        records = records_from_wire(request.records)
        refs = await self._pool.publish(HolderId(request.holder_id), records)
        return pb.PublishReply(slots=refs_to_wire(refs))

    async def _lease_prefix(self, request: pb.LeasePrefixRequest, span: Span) -> pb.LeasePrefixReply:
        block_keys = block_keys_from_wire(request.block_keys)
        resume_keys = resume_keys_from_wire(request.resume_keys, len(block_keys))
        lease = await lease_prefix(self._pool, HolderId(request.holder_id), block_keys, resume_keys)
        set_attributes(span, num_blocks=lease.num_blocks)
        return pb.LeasePrefixReply(
            num_blocks=lease.num_blocks,
            blocks=refs_to_wire(lease.blocks),
            resume_parts=refs_to_wire(lease.resume_parts),
        )

    async def _release(self, request: pb.ReleaseRequest, span: Span) -> pb.ReleaseReply:
        set_attributes(span, num_blocks=len(request.slots))
        stale = self._pool.release(HolderId(request.holder_id), refs_from_wire(request.slots))
        return pb.ReleaseReply(stale=stale)

    async def _announce(self, request: pb.AnnounceRequest) -> pb.AnnounceReply:
        void = self._pool.announce(HolderId(request.holder_id), refs_from_wire(request.slots))
        _log.info("announced", holder=request.holder_id, leases=len(request.slots), void=len(void))
        return pb.AnnounceReply(void=refs_to_wire(void))

    async def _stat(self) -> pb.StatReply:
        counts = self._pool.counts()
        return pb.StatReply(
            total=counts.total,
            free=counts.free,
            writing=counts.writing,
            leased=counts.leased,
            cached=counts.cached,
            evictions=self._pool.counters.evictions,
            damaged=self._pool.counters.damaged,
            holders=len(self._holders),
        )

    async def _traced(self, name: SpanName, context: Context, work: Callable[[Span], Awaitable[_T]]) -> _T:
        parent = incoming_context(metadata_of(context))

        async def within() -> _T:
            with self._telemetry.span(name, parent, kind=SpanKind.SERVER) as span:
                return await work(span)

        return await _typed(context, within())


async def _typed(context: Context, work: Awaitable[_T]) -> _T:
    """The work's result; its typed error ends the call as such."""
    try:
        return await work
    except ForepageError as error:
        _log.info("call_refused", code=error.code, reason=str(error))
        await abort(context, error)
