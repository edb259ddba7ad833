"""The real cold pool behind a worker's loop, without processes: its arena file, tables, leases and evictions.

What a transport and a manager can do to a worker can be done here: answers held back, calls that fail, a
manager that is gone and comes back as a new one from the headers of the arena.
"""

from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from forepage.coldpool.arena import Arena, arena_path
from forepage.coldpool.client import PublishedRecord, Reattached, SlotRef
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.tiers import RecordTiers
from forepage.errors import DependencyError, ForepageError
from forepage.kv.geometry import KvGeometry
from forepage.settings import Verify
from forepage.telemetry import Telemetry
from forepage.worker.arena_access import Grant, GrantRequest
from rigs.memory_arena import MemoryArena

HOLDER, OTHER = HolderId("worker"), HolderId("other")
T = TypeVar("T")


class Run(Protocol):
    """Carries a coroutine out to its end."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Its result."""


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits: without tiers the pool's verbs don't."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


class PoolArena(MemoryArena):
    """An ArenaPort over the real pool; `leases` is the account that its worker keeps."""

    def __init__(
        self,
        folder: Path,
        geometry: KvGeometry,
        num_slots: int,
        telemetry: Telemetry,
        *,
        tiers: RecordTiers | None = None,
        run: Run = run_now,
    ) -> None:
        """`run` carries out the pool's verbs: with `tiers` they wait."""
        super().__init__(geometry, 0)
        self.path = arena_path(folder, "stress")
        self._telemetry, self._tiers, self._run = telemetry, tiers, run
        self._view = Arena.create(self.path, slot_bytes=geometry.slot_bytes, num_slots=num_slots)
        self.num_slots = num_slots
        self.payloads = torch.frombuffer(self._view.buffer, dtype=torch.uint8)
        self.is_slow = self.loses_replies = False
        self.on_reattach: Callable[[Reattached], None] = lambda _: None
        self._is_stale = False
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.pool = self._manager(LeaseTable(num_slots, first_generation=1))
        self.pool.add_holder(HOLDER)

    def matches(self, ref: SlotRef) -> bool:
        """The real header."""
        return self._view.matches(ref)

    def catch_up(self) -> None:
        """Answer what was held back, in order."""
        waiting, self._waiting = self._waiting, []
        for future, act in waiting:
            self._settle(future, act)

    def evict_all(self) -> None:
        """Another holder needs every slot for a moment, and leaves other bytes in each."""
        self.pool.add_holder(OTHER)
        refs = self._run(self.pool.reserve(OTHER, self.num_slots))
        for ref in refs:
            self.payload(ref).fill_(0xFF)
        self.pool.release(OTHER, refs)

    def damage(self, ref: SlotRef) -> None:
        """The scrubber finds the record's payload damaged."""
        self.pool._refuse(ref, self.pool.table.record_of(ref))  # type: ignore[arg-type]

    def come_back(self, *, as_new: bool = False) -> None:
        """The manager answers again (`as_new`: another process, from the headers) and hears the account.

        What was asked of the one before is answered by an error first: nobody announces with calls open.
        """
        self.is_down = True
        self.catch_up()
        self.is_down = False
        if as_new:
            table = LeaseTable(self.num_slots, first_generation=0)
            table.adopt(self._view.headers(), [HOLDER])
            self.pool = self._manager(table)
            self.pool.add_holder(HOLDER)
        self._announce()

    def _announce(self) -> None:
        void = self.pool.announce(HOLDER, list(self.leases.elements()))
        self.leases.subtract(void)
        self.leases = +self.leases
        self._is_stale = False
        if void:
            self.on_reattach(Reattached(tuple(void), None))

    def lose_the_worker(self) -> None:
        """Its process is gone: the kernel has opened its lock, what it was asking for is forgotten."""
        self._waiting.clear()
        self.leases.clear()
        self.is_slow = self.loses_replies = self._is_stale = False
        self.pool.drop_holder(HOLDER)
        self.pool.add_holder(HOLDER)

    def check_laws(self) -> None:
        """Conservation, and while the manager answers its leases are those of the worker's account."""
        self.pool.table.check_integrity()
        counts = self.pool.counts()
        assert counts.free + counts.writing + counts.leased + counts.cached == counts.total == self.num_slots
        for arena_id, header in self._view.headers():
            assert header is not None
            ref = self.pool.table._slots.ref_of(arena_id)
            assert header.generation == ref.generation, "the header is behind the table"
        if not (self.is_down or self._waiting or self._is_stale):
            held = {ref.arena_id: count for ref, count in self.leases.items() if count}
            assert dict(self.pool.table._leases_of(HOLDER)) == held

    def grant(self, request: GrantRequest, span: Any) -> Future[Grant]:  # noqa: ARG002
        """Lease the longest prefix, reserve the rest."""
        return self._answer(lambda: self._grant(request))

    def release(self, refs: Seq[SlotRef], span: Any) -> Future[None]:  # noqa: ARG002
        """Out of the account at once; the manager hears it now, or with the next announcement."""
        held = [ref for ref in refs if self.leases[ref] > 0]
        self.leases.subtract(held)
        self.leases = +self.leases

        def act() -> None:
            self.pool.release(HOLDER, held)

        return self._answer(act)

    def _grant(self, request: GrantRequest) -> Grant:
        parts = [
            [keys[start : start + 32] for start in range(0, len(keys), 32)] for keys in request.resume_keys
        ]
        found = self._run(lease_prefix(self.pool, HOLDER, request.block_keys, parts))
        leased = [*found.blocks, *found.resume_parts]
        try:
            empty = self._run(self.pool.reserve(HOLDER, request.num_slots - found.num_blocks))
        except ForepageError:
            self.pool.release(HOLDER, leased)
            raise
        self.leases.update([*leased, *empty])
        return Grant(found.blocks, found.resume_parts, tuple(empty))

    def publish(self, records: Seq[PublishedRecord], span: Any) -> Future[list[SlotRef]]:  # noqa: ARG002
        """All or none; the lease moves to the slot that stands for each."""
        return self._answer(lambda: self._publish_all(records))

    def _publish_all(self, records: Seq[PublishedRecord]) -> list[SlotRef]:
        refs = self._run(self.pool.publish(HOLDER, records))
        self.leases.subtract([record.slot for record in records])
        self.leases.update(refs)
        return refs

    def _answer(self, act: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.is_slow:
            self._waiting.append((future, act))
        else:
            self._settle(future, act)
        return future

    def _settle(self, future: Future[Any], act: Callable[[], Any]) -> None:
        try:
            if self.is_down:
                raise DependencyError("cold pool down")
            if self._is_stale:
                self._announce()
            before = self.leases.copy()
            result = act()
            if self.loses_replies:
                self.leases, self._is_stale = before, True
                raise DependencyError("no answer of the cold pool in time")
            future.set_result(result)
        except ForepageError as error:
            future.set_exception(error)

    def _manager(self, table: LeaseTable) -> ColdPool:
        counters = ColdPoolCounters(self._telemetry)
        return ColdPool(
            self._view,
            table,
            tiers=RecordTiers([], counters) if self._tiers is None else self._tiers,
            directory=None,
            counters=counters,
            identity=Identity("host", "stress"),
            verify=Verify.SCRUB,
        )
