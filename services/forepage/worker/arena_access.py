"""The loop's way to the cold pool: calls run on the event loop's thread, answers come back as futures."""

import asyncio
from collections.abc import Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry.trace import Span

from forepage.coldpool.client import ColdPoolClient, PublishedRecord, SlotRef
from forepage.errors import ForepageError

T = TypeVar("T")


@dataclass(frozen=True)
class Grant:
    """What the arena gave a new sequence: its cached prefix and empty slots for the rest."""

    prefix: tuple[SlotRef, ...]
    resume_parts: tuple[SlotRef, ...]
    empty: tuple[SlotRef, ...]


@dataclass(frozen=True)
class GrantRequest:
    """Keys to look for, and how many slots the sequence will fill if nothing is found."""

    block_keys: tuple[bytes, ...]
    resume_keys: tuple[bytes, ...]
    num_slots: int


class ArenaAccess:
    """Leases, publications and releases of one worker; also owns the mapping of the arena."""

    def __init__(self, client: ColdPoolClient, loop: asyncio.AbstractEventLoop) -> None:
        """`client` is attached; `loop` runs it."""
        self._client = client
        self._loop = loop

    def grant(self, request: GrantRequest, span: Span) -> Future[Grant]:
        """Lease the longest cached prefix and reserve slots for the rest; all or nothing."""
        return self._call(self._grant(request, span))

    def publish(self, records: Seq[PublishedRecord], span: Span) -> Future[list[SlotRef]]:
        """Make written slots findable; answers the slot that now stands for each."""
        return self._call(self._client.publish(records, span=span))

    def release(self, refs: Seq[SlotRef], span: Span | None) -> Future[None]:
        """Give leases and unwritten slots back; a manager that is down forgets them with us."""
        return self._call(self._release(refs, span))

    def matches(self, ref: SlotRef) -> bool:
        """Whether the arena still holds this record."""
        return self._client.view.matches(ref)

    def offset(self, ref: SlotRef) -> int:
        """Where the record's payload begins in the mapped payload area."""
        return self._client.view.payload_offset(ref.arena_id)

    @property
    def num_leases(self) -> int:
        """Leases and reserved slots of this worker."""
        return self._client.num_leases

    @property
    def num_slots(self) -> int:
        """Slots of the whole arena."""
        return self._client.view.num_slots

    async def _grant(self, request: GrantRequest, span: Span) -> Grant:
        leased = await self._client.lease_prefix(request.block_keys, request.resume_keys, span=span)
        try:
            empty = await self._client.reserve(request.num_slots - len(leased.blocks), span=span)
        except ForepageError:
            await self._release([*leased.blocks, *leased.resume_parts], span)
            raise
        return Grant(tuple(leased.blocks), tuple(leased.resume_parts), tuple(empty))

    async def _release(self, refs: Seq[SlotRef], span: Span | None) -> None:
        if refs:
            await self._client.release(refs, span=span)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
