"""A holder's side of the cold pool: what a worker calls, from one event loop.

While the manager is down every call fails at once with DependencyError; leases stand, and what could not
be given back meanwhile is told with the next announcement (attachment.py).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from opentelemetry.trace import Span

from forepage.coldpool.arena import ArenaView
from forepage.coldpool.attachment import CALL_TIMEOUT_S, Attachment, Method, OnReattach, Reattached
from forepage.coldpool.lease_table import UNKNOWN_HOLDER, PrefixLease
from forepage.coldpool.records import KEY_BYTES, PublishedRecord, RecordKind, SlotRef
from forepage.coldpool.wire import record_to_wire, refs_from_wire, refs_to_wire
from forepage.errors import DependencyError, ForepageError, IntegrityError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.tls import MutualTls
from forepage.telemetry import MetricName, Telemetry

__all__ = [
    "ColdPoolClient",
    "PoolStat",
    "PrefixLease",
    "PublishedRecord",
    "Reattached",
    "RecordKind",
    "SlotRef",
]

ATTACH_TIMEOUT_S = 30.0
"""How long `attach` tries while the manager is still starting."""
MOVING_TIMEOUT_S = 30.0
"""Reserve may have to spill records to a tier first, LeasePrefix to load them from one."""
WATCH_INTERVAL_S = 1.0
_RETRY_S = 0.1
_T = TypeVar("_T")
_log = structlog.get_logger("forepage.coldpool.client")


@dataclass(frozen=True)
class PoolStat:
    """The manager's figures; `free`, `writing`, `leased` and `cached` add up to `total`."""

    total: int
    free: int
    writing: int
    leased: int
    cached: int
    evictions: int
    damaged: int
    holders: int


class ColdPoolClient:
    """One holder: `attach` first, `watch` in a task of the process, `close` last."""

    def __init__(
        self,
        address: str,
        *,
        holder_id: str,
        slot_bytes: int,
        model_fingerprint: str,
        telemetry: Telemetry,
        on_reattach: OnReattach | None = None,
        tls: MutualTls | None = None,
    ) -> None:
        """`on_reattach` hears (on the event loop) of leases and arenas lost with an earlier manager.

        Without it a new arena makes every later call fail: somebody would go on using the old mapping.
        """
        identity = pb.AttachRequest(
            holder_id=holder_id, slot_bytes=slot_bytes, model_fingerprint=model_fingerprint
        )
        self._holder_id = holder_id
        self._telemetry = telemetry
        self._bond = Attachment(address, identity, telemetry=telemetry, on_reattach=on_reattach, tls=tls)

    @property
    def view(self) -> ArenaView:
        """The arena, payloads writable. Raises: DependencyError before `attach`."""
        if self._bond.view is None:
            raise DependencyError("cold pool: not attached yet")
        return self._bond.view

    @property
    def arena_path(self) -> Path:
        """The arena's file, for processes that share this holder's leases. Raises: as `view`."""
        if self._bond.arena_path is None:
            raise DependencyError("cold pool: not attached yet")
        return self._bond.arena_path

    @property
    def num_leases(self) -> int:
        """Leases and reserved slots of this holder, by its own account."""
        return self._bond.leases.total()

    async def attach(self) -> None:
        """Take the holder's lock, map the arena, announce; tried again while the manager is not there.

        Raises: DependencyError (no manager in time, name in use, other folder), ModelFormatError (slots
        of another size than the manager's).
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + ATTACH_TIMEOUT_S
        while True:
            try:
                async with self._bond.gate.alone():
                    return await self._bond.renew()
            except DependencyError:
                if clock() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def watch(self) -> None:
        """For ever: notice a restarted manager although nothing is called, and announce to it.

        A manager does not evict what it adopted until every holder of before has announced.
        """
        is_down = False
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                await self._bond.look_for_restart()
                await self._bond.ensure()
                is_down = False
            except ForepageError as error:
                if not is_down:
                    _log.warning("manager_down", reason=str(error))
                is_down = True

    async def reserve(self, count: int, *, span: Span | None = None) -> list[SlotRef]:
        """Empty slots to write, all or none. Raises: CapacityError (no room now), DependencyError.

        This and the next two also raise IntegrityError for a reply that does not fit what was asked.
        """
        if count <= 0:
            return []

        def take(reply: pb.ReserveReply) -> list[SlotRef]:
            refs = self._refs(reply.slots, count)
            self._bond.leases.update(refs)
            return refs

        request = pb.ReserveRequest(holder_id=self._holder_id, count=count)
        return await self._call(self._bond.stub.Reserve, request, take, span=span, timeout_s=MOVING_TIMEOUT_S)

    async def publish(self, records: Sequence[PublishedRecord], *, span: Span | None = None) -> list[SlotRef]:
        """Make written slots findable; answers, in order, the slot that now stands for each record.

        An answer other than the record's slot: the key was there, the lease moved, the slot is free.
        Raises: DependencyError (manager away, or the slots were lost with one), RequestError.
        """
        if not records:
            return []
        slots = [record.slot for record in records]

        def take(reply: pb.PublishReply) -> list[SlotRef]:
            refs = self._refs(reply.slots, len(records))
            self._bond.forget(slots)
            self._bond.leases.update(refs)
            return refs

        request = pb.PublishRequest(
            holder_id=self._holder_id, records=[record_to_wire(record) for record in records]
        )
        return await self._call(self._bond.stub.Publish, request, take, span=span, held=slots)

    async def lease_prefix(
        self, block_keys: Sequence[bytes], resume_keys: Sequence[bytes], *, span: Span | None = None
    ) -> PrefixLease:
        """Lease the longest prefix that can be resumed.

        `resume_keys[i]`: part keys of the resume record after block i, concatenated; empty: none wanted.
        Raises: DependencyError, RequestError (keys of a wrong length, repeated, or too many).
        """
        if not block_keys:
            return PrefixLease()

        def take(reply: pb.LeasePrefixReply) -> PrefixLease:
            blocks = self._refs(reply.blocks, min(reply.num_blocks, len(block_keys)))
            num_parts = len(resume_keys[len(blocks) - 1]) // KEY_BYTES if blocks else 0
            parts = self._refs(reply.resume_parts, num_parts)
            self._bond.leases.update([*blocks, *parts])
            return PrefixLease(tuple(blocks), tuple(parts))

        request = pb.LeasePrefixRequest(
            holder_id=self._holder_id, block_keys=block_keys, resume_keys=resume_keys
        )
        return await self._call(
            self._bond.stub.LeasePrefix, request, take, span=span, timeout_s=MOVING_TIMEOUT_S
        )

    async def release(self, refs: Sequence[SlotRef], *, span: Span | None = None) -> int:
        """Give leases (in prefix order) and unpublished slots back; answers how many were stale.

        Never fails, since nobody waits for it: what the manager did not hear, the next announcement tells it.
        """
        if not refs:
            return 0
        bond = self._bond
        request = pb.ReleaseRequest(holder_id=self._holder_id, slots=refs_to_wire(refs))
        try:
            if bond.is_stale:
                async with bond.gate.alone():
                    bond.forget(refs)
                    await bond.renew()
                return 0
            async with bond.gate.call():
                bond.forget(refs)
                reply: pb.ReleaseReply = await bond.send(bond.stub.Release, request, span=span)
                return reply.stale
        except Exception as error:
            bond.is_stale = True
            self._telemetry.count(MetricName.FALLBACKS, fallback="coldpool_release_deferred")
            defect = None if isinstance(error, ForepageError) else error
            _log.warning("release_deferred", slots=len(refs), reason=str(error), exc_info=defect)
            return 0

    async def stat(self, *, span: Span | None = None) -> PoolStat:
        """The manager's figures. Raises: DependencyError."""
        reply: pb.StatReply = await self._bond.send(self._bond.stub.Stat, pb.StatRequest(), span=span)
        return PoolStat(
            total=reply.total,
            free=reply.free,
            writing=reply.writing,
            leased=reply.leased,
            cached=reply.cached,
            evictions=reply.evictions,
            damaged=reply.damaged,
            holders=reply.holders,
        )

    async def close(self) -> None:
        """Give everything back and end the holder."""
        await self._bond.close()

    def _refs(self, slots: Sequence[pb.SlotRef], count: int) -> list[SlotRef]:
        """A reply's refs. Raises: IntegrityError unless so many slots of our arena, as was asked."""
        refs = refs_from_wire(slots)
        beyond = [ref.arena_id for ref in refs if ref.arena_id >= self.view.num_slots]
        if len(refs) != count or beyond:
            self._bond.is_stale = True  # who knows what it holds for us
            raise IntegrityError(
                f"cold pool: its reply has {len(refs)} slots where {count} were due, "
                f"beyond the arena's {self.view.num_slots}: {beyond[:3]}"
            )
        return refs

    async def _call(
        self,
        method: Method,
        request: object,
        take: Callable[[Any], _T],
        *,
        span: Span | None,
        timeout_s: float = CALL_TIMEOUT_S,
        held: Sequence[SlotRef] = (),
    ) -> _T:
        """Call, and enter the reply in the account; once more if the manager turns out to be a new one."""
        bond, is_retry = self._bond, False
        while True:
            await bond.ensure()
            async with bond.gate.call():
                if not all(bond.leases[ref] for ref in held):
                    raise DependencyError("cold pool: the slots were lost when its manager restarted")
                try:
                    return take(await bond.send(method, request, span=span, timeout_s=timeout_s))
                except RequestError as error:
                    if error.param != UNKNOWN_HOLDER or is_retry:
                        raise
                    bond.is_stale = is_retry = True
