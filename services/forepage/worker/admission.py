"""From a waiting request to a prefilled-up-to-its-cached-prefix sequence: memory first, then the arena.

A sequence is admitted only with everything it can come to need: a slot, c128 blocks, promised row and
key blocks, and arena slots for every block and resume record it will write. What is missing is waited
for, by priority and then in order of arrival, until the admission timeout; a request that can never fit is
refused at once. No priority takes memory from a request that was admitted.
"""

import bisect
import time

from forepage.errors import CapacityError, ContextLengthError, DependencyError, ForepageError, RateLimitError
from forepage.kv.block_allocator import BlockAllocator
from forepage.telemetry import MetricName, SpanName, set_attributes
from forepage.worker.arena_access import Grant, GrantRequest
from forepage.worker.commands import BlockLoad
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import Quota, prefill_quota, try_change_promise
from forepage.worker.sequence import DeviceHoldings, Phase, Sequence

RETRY_S = 0.25


class Admission:
    """Owner of the waiting queue."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._waiting: list[Sequence] = []  # in order of admission

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet."""
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request. Raises: RateLimitError (queue full), ContextLengthError (it never fits)."""
        if len(self._waiting) >= self._parts.settings.max_waiting:
            raise RateLimitError("the worker's queue is full; try again later", None, 5.0)
        self._check_fits(sequence)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A waiting request was cancelled or timed out."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def next_waiting(self) -> Sequence | None:
        """The request to admit next, unless it must not be retried yet."""
        if not self._waiting or time.monotonic() < self._waiting[0].retry_at_s:
            return None
        return self._waiting[0]

    def expired(self) -> list[Sequence]:
        """Requests that waited longer than the admission timeout."""
        limit = time.monotonic() - self._parts.settings.admission_timeout_s
        return [sequence for sequence in self._waiting if sequence.arrived_s < limit]

    def try_start(self, sequence: Sequence) -> bool:
        """Take device memory for the next request and ask the arena; False when there is no room now."""
        parts = self._parts
        total = parts.geometry.num_blocks(sequence.request.total_tokens)
        if not self._promise_fixed(total):
            return False
        sequence.device = DeviceHoldings(slot=-1, c128_ids=[], row_promise=0, key_promise=0)
        if not try_change_promise(parts, sequence, prefill_quota(parts, sequence)):
            parts.blocks.slots.try_promise(-1)
            parts.blocks.c128.try_promise(-total)
            sequence.device = None
            return False
        self._waiting.remove(sequence)
        sequence.device.slot = parts.blocks.slots.allocate(1)[0]
        sequence.device.c128_ids = parts.blocks.c128.allocate(total)
        parts.device.clear_slot(sequence.device.slot)
        parts.device.set_c128(sequence.device.slot, sequence.device.c128_ids)
        sequence.stage_span = parts.telemetry.start_span(SpanName.WORKER_ADMIT, sequence.span)
        sequence.phase = Phase.GRANTING
        sequence.grant = parts.arena.grant(self._grant_request(sequence), sequence.stage_span)
        return True

    def take_grant(self, sequence: Sequence) -> None:
        """The arena answered: go on with the cached prefix, or back to its place in the queue."""
        assert sequence.grant is not None
        future, sequence.grant = sequence.grant, None
        try:
            grant = future.result()
        except (CapacityError, DependencyError) as error:
            self._back_to_queue(sequence, error)
            return
        sequence.arena.ref_by_block = dict(enumerate(grant.prefix))
        sequence.arena.num_started = len(grant.prefix)
        sequence.arena.empty = list(grant.empty)
        sequence.arena.resume_refs = list(grant.resume_parts)
        sequence.cached_tokens = sequence.num_processed = (
            len(grant.prefix) * self._parts.geometry.block_tokens
        )
        self._count_prefix(sequence, len(grant.prefix))
        if sequence.stage_span is not None:
            set_attributes(sequence.stage_span, cached_tokens=sequence.cached_tokens)
        self._load_prefix(sequence, grant)

    def finish_loading(self, sequence: Sequence) -> None:
        """The cached prefix is on the device: check its records again, restore window and state."""
        assert sequence.prefix_load is not None
        future, sequence.prefix_load = sequence.prefix_load, None
        future.result()
        refs = [*sequence.arena.ref_by_block.values(), *sequence.arena.resume_refs]
        if not all(self._parts.arena.matches(ref) for ref in refs):
            raise DependencyError(
                "the cached prefix was lost from the cold pool; send the request again", None, 1.0
            )
        if sequence.num_processed:
            offsets = [self._parts.arena.offset(ref) for ref in sequence.arena.resume_refs]
            self._parts.device.restore(sequence.holds.slot, sequence.num_processed, offsets)
        self._end_stage(sequence)
        sequence.phase = Phase.PREFILL

    def _load_prefix(self, sequence: Sequence, grant: Grant) -> None:
        parts, holds = self._parts, sequence.holds
        loads = []
        for idx, ref in enumerate(grant.prefix):
            row_id, key_id = parts.blocks.rows.allocate(1)[0], parts.blocks.keys.allocate(1)[0]
            holds.resident.append(row_id, key_id)
            loads.append(BlockLoad(parts.arena.offset(ref), row_id, key_id, holds.c128_ids[idx]))
        parts.device.set_residency(holds.slot, holds.resident)
        parts.device.set_arena_offsets(holds.slot, [parts.arena.offset(ref) for ref in grant.prefix])
        sequence.prefix_load = parts.device.load(loads)
        sequence.phase = Phase.LOADING

    def _count_prefix(self, sequence: Sequence, num_found: int) -> None:
        """Blocks of the prompt that the cold pool had, and those that have to be computed."""
        telemetry, geometry = self._parts.telemetry, self._parts.geometry
        telemetry.count(MetricName.PREFIX_TOKENS, sequence.cached_tokens)
        telemetry.count(MetricName.CACHE_HITS, num_found, cache="prefix")
        num_missing = geometry.num_blocks(len(sequence.request.prompt)) - num_found
        telemetry.count(MetricName.CACHE_MISSES, num_missing, cache="prefix")
        telemetry.count(MetricName.HOST_TO_DEVICE, num_found * geometry.record_bytes, reason="prefix")

    def _back_to_queue(self, sequence: Sequence, error: ForepageError) -> None:
        """No arena slots, or no manager: give the device memory back and try again later."""
        free_device(self._parts, sequence)
        self._end_stage(sequence)
        sequence.phase = Phase.WAITING
        sequence.last_refusal = error
        sequence.retry_at_s = time.monotonic() + RETRY_S
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=lambda one: (one.request.priority, one.arrived_s))

    def _grant_request(self, sequence: Sequence) -> GrantRequest:
        geometry, parts = self._parts.geometry, self._parts.resume_parts
        resumable = (
            len(sequence.request.prompt) - 1
        ) // geometry.block_tokens  # one token is left to compute
        block_keys = [sequence.block_key(idx, geometry) for idx in range(resumable)]
        resume_keys = [
            b"".join(sequence.resume_part_keys(idx + 1, parts, geometry)) for idx in range(resumable)
        ]
        return GrantRequest(tuple(block_keys), tuple(resume_keys), self._arena_slots(sequence))

    def _arena_slots(self, sequence: Sequence) -> int:
        """Slots of every block and resume record that the sequence can come to write."""
        parts, tokens = self._parts, sequence.request.total_tokens
        points = tokens // parts.settings.resume_every_tokens + 2
        return parts.geometry.num_blocks(tokens) + points * parts.resume_parts

    def _promise_fixed(self, total_blocks: int) -> bool:
        slots, c128 = self._parts.blocks.slots, self._parts.blocks.c128
        if not slots.try_promise(1):
            return False
        if not c128.try_promise(total_blocks):
            slots.try_promise(-1)
            return False
        return True

    def _check_fits(self, sequence: Sequence) -> None:
        quota, blocks = prefill_quota(self._parts, sequence), self._parts.blocks
        total = self._parts.geometry.num_blocks(sequence.request.total_tokens)
        for allocator, count in ((blocks.rows, quota.rows), (blocks.keys, quota.keys), (blocks.c128, total)):
            if not allocator.can_ever_promise(count):
                raise _never_fits(allocator, count)
        slots = self._arena_slots(sequence)
        if slots > self._parts.arena.num_slots:
            raise ContextLengthError(
                f"this request needs {slots} arena slots, the cold pool has {self._parts.arena.num_slots}; "
                "shorten it or raise coldpool.capacity_bytes",
                "prompt_token_ids",
            )

    def _end_stage(self, sequence: Sequence) -> None:
        if sequence.stage_span is not None:
            sequence.stage_span.end()
            sequence.stage_span = None


def free_device(parts: WorkerParts, sequence: Sequence) -> None:
    """Give back everything the sequence holds on the device, and its promises."""
    holds = sequence.device
    if holds is None:
        return
    blocks = parts.blocks
    freed = holds.resident.clear()
    blocks.rows.free(freed.row_ids)
    blocks.keys.free(freed.key_ids)
    blocks.rows.free(holds.staging_ids)
    blocks.c128.free(holds.c128_ids)
    blocks.c128.try_promise(-len(holds.c128_ids))
    try_change_promise(parts, sequence, Quota(0, 0))
    parts.device.clear_slot(holds.slot)
    blocks.slots.free([holds.slot])
    blocks.slots.try_promise(-1)
    sequence.device = None


def _never_fits(allocator: BlockAllocator, count: int) -> ContextLengthError:
    return ContextLengthError(
        f"this request needs {count} {allocator.name}, the worker has {allocator.total}; "
        "shorten it, lower max_tokens, or raise worker.kv_bytes",
        "prompt_token_ids",
    )
