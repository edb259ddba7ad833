"""A holder's side of the cold pool: used by a worker, from one event loop.

Owns the holder's lock (what its leases hang on), the mapping of the arena, and the account of its own
leases. The account is the truth: after anything that may have made the manager's differ (a lost reply, a
cancelled call, a restarted manager) the next call first attaches again and announces it. While the
manager is down every call fails at once with DependencyError, and nothing leased is lost.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from opentelemetry.trace import Span

from forepage.coldpool.arena import ArenaView
from forepage.coldpool.call_gate import CallGate
from forepage.coldpool.holder_lock import ProcessLock, lock_path_beside
from forepage.coldpool.lease_table import UNKNOWN_HOLDER
from forepage.coldpool.prefix_lease import PrefixLease
from forepage.coldpool.records import PublishedRecord, RecordKind, SlotRef
from forepage.coldpool.wire import record_to_wire, refs_from_wire, refs_to_wire
from forepage.errors import CapacityError, DeadlineError, DependencyError, ForepageError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.coldpool_pb2_grpc import ColdPoolStub
from forepage.rpc.edge import error_of_call, open_channel
from forepage.telemetry import MetricName, Telemetry, outgoing_metadata

__all__ = [
    "ColdPoolClient",
    "PoolStat",
    "PrefixLease",
    "PublishedRecord",
    "Reattached",
    "RecordKind",
    "SlotRef",
]

CALL_TIMEOUT_S = 5.0
MOVING_TIMEOUT_S = 30.0
"""Reserve may have to spill records to a tier first, LeasePrefix to load them from one."""
ATTACH_TIMEOUT_S = 30.0
"""How long `attach` tries while the manager is still starting."""
WATCH_INTERVAL_S = 1.0
_RETRY_S = 0.1
_LOCK_TRIES = 50
_T = TypeVar("_T")
_log = structlog.get_logger("forepage.coldpool.client")


@dataclass(frozen=True)
class Reattached:
    """What a restarted manager meant for this holder."""

    void: tuple[SlotRef, ...]
    """Leases that are gone, one item a lease."""
    new_arena: ArenaView | None
    """The mapping that `view` now answers, if the arena is another one; the old one stays readable."""


@dataclass(frozen=True)
class PoolStat:
    """The manager's figures; the first four add up to `total`."""

    free: int
    writing: int
    leased: int
    cached: int
    total: int
    evictions: int
    damaged: int
    holders: int


class ColdPoolClient:
    """One holder. `attach` first; `watch` in a task of the process; `close` last."""

    def __init__(
        self,
        address: str,
        *,
        holder_id: str,
        slot_bytes: int,
        model_fingerprint: str,
        telemetry: Telemetry,
        on_reattach: Callable[[Reattached], None] | None = None,
    ) -> None:
        """Without `on_reattach` a new arena makes every later call fail: nobody would use its mapping."""
        self._identity = pb.AttachRequest(
            holder_id=holder_id, slot_bytes=slot_bytes, model_fingerprint=model_fingerprint
        )
        self._telemetry = telemetry
        self._on_reattach = on_reattach
        self._channel = open_channel(address)
        self._stub = ColdPoolStub(self._channel)  # type: ignore[no-untyped-call]
        self._gate = CallGate()
        self._leases: Counter[SlotRef] = Counter()
        self._lock: ProcessLock | None = None
        self._view: ArenaView | None = None
        self._epoch = ""
        self._is_stale = True

    @property
    def view(self) -> ArenaView:
        """The arena, payloads writable. Raises: DependencyError before `attach`."""
        if self._view is None:
            raise DependencyError("cold pool: not attached yet")
        return self._view

    @property
    def num_leases(self) -> int:
        """Leases and reserved slots that this holder has, by its own account."""
        return self._leases.total()

    async def attach(self) -> None:
        """Take the holder's lock, map the arena, announce. Tried again while the manager is not there.

        Raises: DependencyError (no manager in time, name in use, other folder), ModelFormatError (other
        slot size than the manager's).
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + ATTACH_TIMEOUT_S
        while True:
            try:
                await self._ensure_attached()
                return
            except DependencyError:
                if clock() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def watch(self) -> None:
        """For ever: notice a restarted manager although nothing is called, and announce to it."""
        is_down = False
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                await self._look_for_restart()
                await self._ensure_attached()
                is_down = False
            except ForepageError as error:
                if not is_down:
                    _log.warning("manager_down", reason=str(error))
                is_down = True

    async def reserve(self, count: int, *, span: Span | None = None) -> list[SlotRef]:
        """Empty slots to write, all or none. Raises: CapacityError (no room now), DependencyError."""
        if count <= 0:
            return []
        request = pb.ReserveRequest(holder_id=self._identity.holder_id, count=count)

        def take(reply: pb.ReserveReply) -> list[SlotRef]:
            refs = refs_from_wire(reply.slots)
            self._leases.update(refs)
            return refs

        return await self._call(self._stub.Reserve, request, take, span=span, timeout_s=MOVING_TIMEOUT_S)

    async def publish(self, records: Sequence[PublishedRecord], *, span: Span | None = None) -> list[SlotRef]:
        """Make written slots findable; answers, in order, the slot that now stands for each record.

        An answer other than the record's slot: the key was there, the lease moved, the slot is free.
        Raises: DependencyError (manager away, or the slots were lost with it), RequestError.
        """
        if not records:
            return []
        slots = [record.slot for record in records]
        request = pb.PublishRequest(
            holder_id=self._identity.holder_id, records=[record_to_wire(record) for record in records]
        )

        def take(reply: pb.PublishReply) -> list[SlotRef]:
            refs = refs_from_wire(reply.slots)
            self._forget(slots)
            self._leases.update(refs)
            return refs

        return await self._call(self._stub.Publish, request, take, span=span, held=slots)

    async def lease_prefix(
        self, block_keys: Sequence[bytes], resume_keys: Sequence[bytes], *, span: Span | None = None
    ) -> PrefixLease:
        """Lease the longest prefix that can be resumed; `resume_keys` as in coldpool.proto.

        Raises: DependencyError, RequestError (keys of a wrong length, or repeated).
        """
        if not block_keys:
            return PrefixLease()
        request = pb.LeasePrefixRequest(
            holder_id=self._identity.holder_id, block_keys=block_keys, resume_keys=resume_keys
        )

        def take(reply: pb.LeasePrefixReply) -> PrefixLease:
            lease = PrefixLease(
                tuple(refs_from_wire(reply.blocks)), tuple(refs_from_wire(reply.resume_parts))
            )
            self._leases.update([*lease.blocks, *lease.resume_parts])
            return lease

        return await self._call(self._stub.LeasePrefix, request, take, span=span, timeout_s=MOVING_TIMEOUT_S)

    async def release(self, refs: Sequence[SlotRef], *, span: Span | None = None) -> int:
        """Give leases (in prefix order) and unpublished slots back; answers how many were stale.

        Never fails: what a manager that is away did not hear, the next announcement tells it.
        """
        request = pb.ReleaseRequest(holder_id=self._identity.holder_id, slots=refs_to_wire(refs))
        try:
            if self._is_stale:
                async with self._gate.alone():
                    self._forget(refs)
                    await self._attach_and_announce()
                return 0
            async with self._gate.call():
                self._forget(refs)
                reply: pb.ReleaseReply = await self._send(
                    self._stub.Release, request, span=span, timeout_s=CALL_TIMEOUT_S
                )
                return reply.stale
        except ForepageError as error:
            self._is_stale = True
            self._telemetry.count(MetricName.FALLBACKS, fallback="coldpool_release_deferred")
            _log.warning("release_deferred", slots=len(refs), reason=str(error))
            return 0

    async def stat(self, *, span: Span | None = None) -> PoolStat:
        """The manager's figures. Raises: DependencyError."""
        reply: pb.StatReply = await self._send(
            self._stub.Stat, pb.StatRequest(), span=span, timeout_s=CALL_TIMEOUT_S
        )
        return PoolStat(
            free=reply.free,
            writing=reply.writing,
            leased=reply.leased,
            cached=reply.cached,
            total=reply.total,
            evictions=reply.evictions,
            damaged=reply.damaged,
            holders=reply.holders,
        )

    async def close(self) -> None:
        """Give everything back (at once, if the manager is there), then the lock."""
        if self._lock is not None:
            self._leases.clear()
            try:
                await self._announce()
            except ForepageError as error:
                _log.info("closed_without_manager", reason=str(error))  # the lock tells it later
            self._lock.release()
            self._lock = None
        self._is_stale = True
        await self._channel.close()

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        request: object,
        take: Callable[[Any], _T],
        *,
        span: Span | None,
        timeout_s: float = CALL_TIMEOUT_S,
        held: Sequence[SlotRef] = (),
    ) -> _T:
        """Call, and enter the reply in the account; once more if the manager turns out to be a new one."""
        is_retry = False
        while True:
            await self._ensure_attached()
            async with self._gate.call():
                if not all(self._leases[ref] for ref in held):
                    raise DependencyError("cold pool: the slots were lost when its manager restarted")
                try:
                    return take(await self._send(method, request, span=span, timeout_s=timeout_s))
                except RequestError as error:
                    if error.param != UNKNOWN_HOLDER or is_retry:
                        raise
                    self._is_stale = is_retry = True

    async def _send(
        self, method: Callable[..., Awaitable[Any]], request: object, *, span: Span | None, timeout_s: float
    ) -> Any:
        """One RPC; whatever leaves it open whether the manager did it makes the account stale."""
        try:
            return await method(request, timeout=timeout_s, metadata=outgoing_metadata(span))
        except grpc.aio.AioRpcError as failure:
            error = error_of_call(failure, what="cold pool")
            if isinstance(error, DeadlineError):  # ours, not the request's
                error = DependencyError(f"cold pool: no answer in {timeout_s:g} s", retry_after_s=1.0)
            if not isinstance(error, RequestError | CapacityError):
                self._is_stale = True
            raise error from failure
        except asyncio.CancelledError:
            self._is_stale = True
            raise

    async def _ensure_attached(self) -> None:
        if self._is_stale:
            async with self._gate.alone():
                if self._is_stale:
                    await self._attach_and_announce()

    async def _attach_and_announce(self) -> None:
        """Bring manager and account together; the caller is alone."""
        self._is_stale = True
        reply = await self._attach_locked()
        void = self._map(reply)
        void += await self._announce()
        is_restart, self._epoch = bool(self._epoch), reply.manager_epoch
        self._is_stale = False
        if is_restart:
            self._telemetry.count(MetricName.FALLBACKS, fallback="coldpool_reattached")
            _log.info("reattached", leases=self.num_leases, void=len(void))

    async def _attach_locked(self) -> pb.AttachReply:
        """Attach under the holder's lock, taken here if need be."""
        if self._lock is None:
            where = pb.AttachRequest(slot_bytes=self._identity.slot_bytes)
            self._lock = await self._take_lock(await self._attach(where))
        try:
            return await self._attach(self._identity)
        except RequestError as error:
            if error.param != UNKNOWN_HOLDER or self._lock.is_findable:
                raise DependencyError(f"cold pool: {error}") from error
        # A clean shutdown of an earlier manager removed the lock's file: lock a new one.
        self._lock.release()
        self._lock = None
        return await self._attach_locked()
