"""A cold pool's arena without processes: slots, leases and records of a tensor in memory."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from typing import Any

import torch
from opentelemetry.trace import Span
from torch import Tensor

from forepage.coldpool.client import PublishedRecord, SlotRef
from forepage.errors import CapacityError, DependencyError, ForepageError
from forepage.kv.geometry import KvGeometry
from forepage.kv.ids import ArenaId
from forepage.worker.arena_access import Grant, GrantRequest


class MemoryArena:
    """An ArenaPort over a tensor; can be down, and can hold its answers back."""

    def __init__(self, geometry: KvGeometry, num_slots: int, *, is_pinned: bool = False) -> None:
        num_bytes = num_slots * geometry.slot_bytes
        self.payloads = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.num_slots = num_slots
        self.is_down = False
        self.leases: Counter[SlotRef] = Counter()
        self.lost: set[SlotRef] = set()
        self.ref_by_key: dict[bytes, SlotRef] = {}
        self._slot_bytes = geometry.slot_bytes
        self._generation = 0

    @property
    def num_leases(self) -> int:
        return self.leases.total()

    def grant(self, request: GrantRequest, span: Span) -> Future[Grant]:  # noqa: ARG002
        return self._answer(lambda: self._grant(request))

    def publish(self, records: Seq[PublishedRecord], span: Span) -> Future[list[SlotRef]]:  # noqa: ARG002
        return self._answer(lambda: [self._publish(record) for record in records])

    def release(self, refs: Seq[SlotRef], span: Span | None) -> Future[None]:  # noqa: ARG002
        for ref in refs:
            assert self.leases[ref] > 0, f"{ref} released but not leased"
            self.leases[ref] -= 1
        return self._answer(lambda: None)

    def matches(self, ref: SlotRef) -> bool:
        return ref not in self.lost

    def offset(self, ref: SlotRef) -> int:
        return ref.arena_id * self._slot_bytes

    def payload(self, ref: SlotRef) -> Tensor:
        return self.payloads[self.offset(ref) : self.offset(ref) + self._slot_bytes]

    def _grant(self, request: GrantRequest) -> Grant:
        blocks, resume = self._prefix(request)
        count = request.num_slots - len(blocks)
        used = {ref.arena_id for ref, leases in self.leases.items() if leases} | {
            ref.arena_id for ref in self.ref_by_key.values()
        }
        free = [idx for idx in range(self.num_slots) if idx not in used]
        if len(free) < count:
            raise CapacityError("arena full", None, 0.1)
        empty = []
        for idx in free[:count]:
            self._generation += 1
            empty.append(SlotRef(ArenaId(idx), self._generation))
        self.leases.update([*blocks, *resume, *empty])
        return Grant(tuple(blocks), tuple(resume), tuple(empty))

    def _prefix(self, request: GrantRequest) -> tuple[list[SlotRef], list[SlotRef]]:
        for count in range(len(request.block_keys), 0, -1):
            parts = request.resume_keys[count - 1]
            keys = [*request.block_keys[:count], *(parts[i : i + 32] for i in range(0, len(parts), 32))]
            if all(key in self.ref_by_key for key in keys):
                refs = [self.ref_by_key[key] for key in keys]
                return refs[:count], refs[count:]
        return [], []

    def _publish(self, record: PublishedRecord) -> SlotRef:
        assert self.leases[record.slot] > 0
        ref = self.ref_by_key.setdefault(record.key, record.slot)
        if ref != record.slot:
            self.leases[record.slot] -= 1
            self.leases[ref] += 1
        return ref

    def _answer(self, act: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self.is_down:
                raise DependencyError("cold pool down")
            future.set_result(act())
        except ForepageError as error:
            future.set_exception(error)
        return future
