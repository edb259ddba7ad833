"""A holder's bond with the manager: its lock, its mapping of the arena, and the account of its leases.

The account is the truth. Whatever may have made the manager's differ (a lost reply, a cancelled call, a
restarted manager) makes the bond *stale*; before the next call it is made anew and the account announced,
alone (call_gate.py), so that no lease in flight is missed.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import structlog
from opentelemetry.trace import Span

from forepage.coldpool.arena import ArenaView
from forepage.coldpool.call_gate import CallGate
from forepage.coldpool.holder_lock import ProcessLock
from forepage.coldpool.records import SlotRef
from forepage.coldpool.shm_names import lock_path_beside
from forepage.coldpool.wire import refs_from_wire, refs_to_wire
from forepage.errors import CapacityError, DeadlineError, DependencyError, ForepageError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.coldpool_pb2_grpc import ColdPoolStub
from forepage.rpc.edge import error_of_call, open_channel
from forepage.rpc.tls import MutualTls
from forepage.telemetry import MetricName, Telemetry
from forepage.trace_context import outgoing_metadata

CALL_TIMEOUT_S = 5.0
_LOCK_RETRY_S = 0.05
_LOCK_TRIES = 40
_log = structlog.get_logger("forepage.coldpool.client")
Method = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Reattached:
    """What a restarted manager meant for this holder."""

    void: tuple[SlotRef, ...]
    """Leases that are gone, one item a lease."""
    new_arena: ArenaView | None
    """The mapping to use from now on, if the arena is another one; the old one stays readable."""


OnReattach = Callable[[Reattached], None]


class Attachment:
    """Owner of channel, lock, mapping and account; for one event loop."""

    def __init__(
        self,
        address: str,
        identity: pb.AttachRequest,
        *,
        telemetry: Telemetry,
        on_reattach: OnReattach | None,
        tls: MutualTls | None,
    ) -> None:
        self._identity = identity
        self._telemetry = telemetry
        self._on_reattach = on_reattach
        self._channel = open_channel(address, tls)
        self._lock: ProcessLock | None = None
        self._epoch = ""
        self._void: list[SlotRef] = []
        self._new_arena: ArenaView | None = None
        """With `_void`: what `on_reattach` has to be told; kept when a bond breaks while it is made."""
        self.stub = ColdPoolStub(self._channel)
        self.gate = CallGate()
        self.leases: Counter[SlotRef] = Counter()
        """Leases and reserved slots; changed only within the gate."""
        self.view: ArenaView | None = None
        self.arena_path: Path | None = None
        self.is_stale = True

    def forget(self, refs: Sequence[SlotRef]) -> None:
        """Take one lease each out of the account."""
        self.leases.subtract(refs)
        for ref in refs:
            if self.leases[ref] <= 0:
                del self.leases[ref]

    async def ensure(self) -> None:
        """Make a stale bond anew. Raises: DependencyError (no manager), ModelFormatError (slot size)."""
        if self.is_stale:
            async with self.gate.alone():
                if self.is_stale:
                    await self.renew()

    async def renew(self) -> None:
        """Bring manager and account together; the caller is alone in the gate."""
        self.is_stale = True
        reply = await self._attach_locked()
        self._map(reply)
        self._void += await self._announce()
        is_first, self._epoch = not self._epoch, reply.manager_epoch
        self.is_stale = False
        void, self._void = self._void, []
        new_arena, self._new_arena = self._new_arena, None
        if is_first:
            return
        self._telemetry.count(MetricName.FALLBACKS, fallback="coldpool_reattached")
        _log.warning("reattached", leases=self.leases.total(), void=len(void), new_arena=bool(new_arena))
        if self._on_reattach is not None and (void or new_arena is not None):
            self._on_reattach(Reattached(tuple(void), new_arena))

    async def look_for_restart(self) -> None:
        """Ask the manager who it is; stale if it is another one. Raises: DependencyError."""
        try:
            async with self.gate.call():
                reply = await self._attach(self._identity)
        except RequestError:  # it does not find our lock: a new one, after a clean shutdown
            self.is_stale = True
            return
        if reply.manager_epoch != self._epoch:
            self.is_stale = True

    async def send(
        self, method: Method, request: object, *, span: Span | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """One RPC; the bond is stale after whatever leaves open whether the manager did it.

        Raises: the manager's typed error, DependencyError where there was none.
        """
        try:
            return await method(request, timeout=timeout_s, metadata=outgoing_metadata(span))
        except asyncio.CancelledError:
            self.is_stale = True
            raise
        except grpc.aio.AioRpcError as failure:
            error = error_of_call(failure, what="cold pool")
            if isinstance(error, DeadlineError):  # the call's, not the request's
                error = DependencyError(f"cold pool: no answer in {timeout_s:g} s", retry_after_s=1.0)
            if not isinstance(error, RequestError | CapacityError):
                self.is_stale = True
            raise error from failure

    async def close(self) -> None:
        """Give everything back, at once if the manager is there, else by the lock's end."""
        self.leases.clear()
        try:
            if self._lock is not None:
                await self._announce()
        except ForepageError as error:
            _log.info("closed_without_manager", reason=str(error))
        finally:
            self.is_stale = True
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            await self._channel.close(None)

    async def _attach_locked(self) -> pb.AttachReply:
        """Attach under the holder's lock, which is taken first."""
        if self._lock is None:
            where = await self._attach(pb.AttachRequest(slot_bytes=self._identity.slot_bytes))
            path = lock_path_beside(Path(where.arena_path), self._identity.holder_id)
            self._lock = await _take_lock(path)
        try:
            return await self._attach(self._identity)
        except RequestError as error:
            if self._lock.is_findable:
                raise DependencyError(f"cold pool: {error}") from error
        # A clean shutdown of an earlier manager removed the lock's file: lock a new one.
        self._lock.release()
        self._lock = None
        return await self._attach_locked()

    async def _attach(self, identity: pb.AttachRequest) -> pb.AttachReply:
        return cast("pb.AttachReply", await self.send(self.stub.Attach, identity))

    async def _announce(self) -> list[SlotRef]:
        """Tell the manager the whole account; answers (and forgets) what it does not grant."""
        request = pb.AnnounceRequest(
            holder_id=self._identity.holder_id, slots=refs_to_wire(self.leases.elements())
        )
        reply: pb.AnnounceReply = await self.send(self.stub.Announce, request)
        void = refs_from_wire(reply.void)
        self.forget(void)
        return void

    def _map(self, reply: pb.AttachReply) -> None:
        """Map the manager's arena; if it replaces another one, note that and the leases lost thereby."""
        if self.view is not None and self.view.uuid == reply.arena_uuid:
            return
        is_first = self.view is None
        self._void += self.leases.elements()
        self.leases.clear()
        if not is_first and self._on_reattach is None:
            raise DependencyError(
                "cold pool: its manager made a new arena and this process can't change over; restart it"
            )
        view = ArenaView.open(Path(reply.arena_path), writable=True)
        if view.uuid != reply.arena_uuid:
            raise DependencyError("cold pool: the arena was replaced while attaching", retry_after_s=1.0)
        self.view, self.arena_path = view, Path(reply.arena_path)
        self._new_arena = None if is_first else view


async def _take_lock(path: Path) -> ProcessLock:
    """Lock, waiting a moment for a manager that looks at it or an earlier process that is ending."""
    for _ in range(_LOCK_TRIES):
        lock = ProcessLock.try_acquire(path)
        if lock is not None:
            return lock
        await asyncio.sleep(_LOCK_RETRY_S)
    raise DependencyError(f"{path} is locked by another process; every holder needs a name of its own")
