"""Finished blocks and resume records go to the arena, in every mode: leaving `full` is then only dropping.

A block may be dropped from the device once its record is complete in the arena. While the cold pool
manager is away, publications wait; the blocks stay on the device.
"""

import time
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

from forepage.coldpool.client import PublishedRecord, RecordKind, SlotRef
from forepage.errors import ForepageError
from forepage.telemetry import MetricName
from forepage.worker.copy_engine import BlockStore
from forepage.worker.parts import WorkerParts
from forepage.worker.sequence import Phase, Sequence, Snapshot

RETRY_S = 0.25
"""Between two tries to publish while the manager is away."""


@dataclass
class _Transfer:
    """Records of one sequence on their way: copied first, then published."""

    sequence: Sequence
    records: list[PublishedRecord]
    block_idx: list[int]
    copied: list[Future[int]] | Future[list[int]]
    published: Future[list[SlotRef]] | None = None
    retry_at_s: float = 0.0


class WriteBack:
    """Owner of the transfers under way."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._transfers: list[_Transfer] = []
        self._is_failing = False

    def store_finished(self, sequence: Sequence) -> None:
        """Start writing back every full block that has not been."""
        geometry, arena = self._parts.geometry, sequence.arena
        blocks = range(arena.num_started, sequence.num_processed // geometry.block_tokens)
        if not blocks:
            return
        resident, holds = sequence.resident, sequence.holds
        refs = [arena.empty.pop() for _ in blocks]
        arena.num_started = blocks.stop
        records = [
            PublishedRecord(
                slot=ref,
                key=sequence.record_key(idx, geometry),
                kind=RecordKind.BLOCK,
                part=0,
                num_parts=1,
                payload_bytes=geometry.record_bytes,
                checksum=0,
                salted=not sequence.clean,
            )
            for idx, ref in zip(blocks, refs, strict=True)
        ]
        stores = [
            BlockStore(
                row_id=resident.row_id_by_block[idx],
                key_id=resident.key_id_by_block[idx],
                c128_id=holds.c128_ids[idx],
                arena_offset=self._parts.arena.offset(ref),
            )
            for idx, ref in zip(blocks, refs, strict=True)
        ]
        self._start(_Transfer(sequence, records, list(blocks), self._parts.device.store(stores)))

    def take_snapshot(self, sequence: Sequence) -> None:
        """Keep window and compressor state of this point (a multiple of 256 tokens) for a resume record."""
        if sequence.clean:
            sequence.snapshot = self.snapshot_at(sequence, sequence.num_processed)

    def snapshot_at(self, sequence: Sequence, num_tokens: int) -> Snapshot:
        """The state that the last step launched leaves, before another one changes it."""
        return Snapshot(num_tokens, self._parts.device.snapshot(sequence.holds.slot, num_tokens))

    def store_resume(self, sequence: Sequence) -> None:
        """Write the kept snapshot as a resume record; its blocks are on their way or there."""
        parts, arena, kept = self._parts, sequence.arena, sequence.snapshot
        num_parts, geometry = parts.resume_parts, parts.geometry
        sequence.snapshot = None
        if kept is None or len(arena.empty) < num_parts:
            return
        pieces = kept.payload.read().split(geometry.slot_bytes)
        keys = sequence.resume_part_keys(kept.num_tokens // geometry.block_tokens, num_parts, geometry)
        refs = [arena.empty.pop() for _ in pieces]
        records = [
            PublishedRecord(
                slot=ref,
                key=key,
                kind=RecordKind.RESUME,
                part=part,
                num_parts=num_parts,
                payload_bytes=piece.numel(),
                checksum=0,
                salted=False,
            )
            for part, (ref, key, piece) in enumerate(zip(refs, keys, pieces, strict=True))
        ]
        copied = [
            parts.device.put(parts.arena.offset(ref), piece) for ref, piece in zip(refs, pieces, strict=True)
        ]
        self._start(_Transfer(sequence, records, [], copied))

    def tick(self) -> None:
        """Between steps: publish what has been copied, take in what has been published."""
        self._transfers = [transfer for transfer in self._transfers if not self._advance(transfer)]

    def _start(self, transfer: _Transfer) -> None:
        transfer.sequence.arena.writing.extend(record.slot for record in transfer.records)
        self._parts.telemetry.move(MetricName.PENDING_WRITES, len(transfer.records))
        self._transfers.append(transfer)

    def _advance(self, transfer: _Transfer) -> bool:
        """Whether the transfer is over."""
        sequence = transfer.sequence
        if transfer.published is None:
            if time.monotonic() < transfer.retry_at_s:
                return False
            sums = _checksums(transfer.copied)
            if sums is not None:
                records = [
                    record.with_checksum(sum_) for record, sum_ in zip(transfer.records, sums, strict=True)
                ]
                transfer.published = self._parts.arena.publish(records, sequence.span)
            return False
        if not transfer.published.done():
            return False
        try:
            refs = transfer.published.result()
        except ForepageError as error:
            if not self._is_failing:  # once an outage: every transfer fails at every try
                self._is_failing = True
                self._parts.log.warning("publication failed; will be tried again", error=str(error))
            self._parts.telemetry.count(MetricName.FALLBACKS, fallback="publish_retry")
            transfer.published = None
            transfer.retry_at_s = time.monotonic() + RETRY_S
            return sequence.phase is Phase.DONE and self._abandon(transfer)
        if self._is_failing:
            self._is_failing = False
            self._parts.log.info("publication works again")
        self._end(transfer)
        num_bytes = sum(record.payload_bytes for record in transfer.records)
        self._parts.telemetry.count(MetricName.DEVICE_TO_HOST, num_bytes)
        self._take(sequence, transfer.block_idx, refs)
        return True

    def _end(self, transfer: _Transfer) -> None:
        """The slots are no longer being written: they are records, or go back unpublished."""
        self._parts.telemetry.move(MetricName.PENDING_WRITES, -len(transfer.records))
        for record in transfer.records:
            transfer.sequence.arena.writing.remove(record.slot)

    def _take(self, sequence: Sequence, block_idx: Seq[int], refs: Seq[SlotRef]) -> None:
        arena = sequence.arena
        if not block_idx:
            arena.resume_refs.extend(refs)
            return
        arena.ref_by_block.update(zip(block_idx, refs, strict=True))
        if sequence.device is not None:
            offsets = {idx: self._parts.arena.offset(ref) for idx, ref in zip(block_idx, refs, strict=True)}
            self._parts.device.edit_arena_offsets(sequence.device.slot, offsets)

    def _abandon(self, transfer: _Transfer) -> bool:
        """The sequence is gone and the manager too: its slots go back when the leases are announced."""
        self._end(transfer)
        transfer.sequence.arena.empty.extend(record.slot for record in transfer.records)
        return True


def _checksums(copied: list[Future[int]] | Future[list[int]]) -> list[int] | None:
    """The records' checksums once every copy is done."""
    if isinstance(copied, Future):
        return copied.result() if copied.done() else None
    return [future.result() for future in copied] if all(future.done() for future in copied) else None
