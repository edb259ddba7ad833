"""Audits on the worker's own device, launched right behind the step they are about.

What the step asked with and what it selected is there already, and a kernel reads the absent blocks' keys
straight from the arena. So nothing travels to another process, and the verdict is known when the step's token
is: an answer of forty tokens can be repaired while it is written. The index makes the audits of workers that
have no such device.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forepage.kv.evidence import EVIDENCE_PROBABILITY, AuditVerdict
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO
from forepage.kv.ids import BlockIdx
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.model.kv_pools import key_layout
from forepage.worker.commands import Table
from forepage.worker.host_copy import HostCopy, upload
from forepage.worker.kv_memory import NO_ARENA, KvMemory
from forepage_kernels.layout import KeyPool
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.select_topk import select_topk

MOST_EVIDENCE = round(1 / EVIDENCE_PROBABILITY)
"""Entries that can hold so much at the same time."""
NUM_HEAD = 5
"""Columns of a packed verdict before its missing entries: counts and shares."""


@dataclass(frozen=True)
class AuditRow:
    """One sequence's step to be looked at, in some c4 layers."""

    slot: int
    position: int
    layers: tuple[int, ...]
    marks_miss: bool = False
    """After a miss the next step is left out."""


@dataclass(frozen=True)
class StepAudit:
    """What one step missed in each of `layers`; `num_unread` absent blocks had damaged keys."""

    position: int
    layers: tuple[int, ...]
    verdicts: tuple[AuditVerdict, ...]
    num_unread: int

    @property
    def has_missed(self) -> bool:
        """Whether evidence was absent in any of the layers."""
        return any(verdict.num_evidence_resident < verdict.num_evidence for verdict in self.verdicts)


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of n (row, layer) pairs, as tensors."""

    counts: Tensor  # i64 [n, 3]: evidence, of it resident, blocks unread
    shares: Tensor  # f64 [n, 2]: missed mass, recall at k
    missing: Tensor  # i64 [n, MOST_EVIDENCE]: absent entries with evidence, -1 behind them
    masses: Tensor  # f64 [n, MOST_EVIDENCE]

    def packed(self) -> Tensor:
        """All of it as one f64 [n, ...], so that one copy brings it over; integers are exact in f64."""
        return torch.cat((self.counts.double(), self.shares, self.missing.double(), self.masses), dim=1)


@dataclass(frozen=True)
class AuditCopies:
    """Verdicts on their way to the host."""

    rows: tuple[AuditRow, ...]
    place: dict[tuple[int, int], int]
    """(row, layer) -> which line of `packed`."""
    packed: HostCopy

    def read(self, row: int) -> StepAudit:
        """One row's; waits for the copy."""
        asked, lines = self.rows[row], self.packed.read()
        found = [_verdict(lines[self.place[row, layer]]) for layer in asked.layers]
        num_unread = sum(unread for _, unread in found)
        return StepAudit(asked.position, asked.layers, tuple(verdict for verdict, _ in found), num_unread)


@dataclass(frozen=True)
class LayerTap:
    """What some of the audited rows (`members`) left in one layer."""

    layer: int
    members: tuple[int, ...]
    query: Tensor  # f32 [m, H, D]
    weights: Tensor  # f32 [m, H]
    selected: Tensor  # i64 [m, k]
    scores: Tensor  # f32 [m, k]


def members_by_layer(rows: Seq[AuditRow]) -> dict[int, tuple[int, ...]]:
    """Which rows are looked at in each layer, both ascending."""
    layers = sorted({layer for row in rows for layer in row.layers})
    return {layer: tuple(at for at, row in enumerate(rows) if layer in row.layers) for layer in layers}


class DeviceAudit:
    """Asks the arena what a step could not see. Reads tables and keys, changes nothing."""

    def __init__(self, memory: KvMemory, arena: Tensor, *, topk: int) -> None:
        """`arena` is the payload area, u8: on the CPU, and page-locked where `memory` is on a GPU."""
        self._memory = memory
        self._topk = topk
        slot_bytes = memory.geometry.slot_bytes
        self._slots = arena[: arena.numel() // slot_bytes * slot_bytes].view(-1, slot_bytes)

    def absent(self, rows: Seq[AuditRow]) -> Tensor:
        """The arena slot of every block whose keys are absent, else -1: i32 [n, M].

        A copy: later commits change the tables, not what is audited with it.
        """
        memory = self._memory
        blocks = memory.geometry.num_blocks(max(row.position for row in rows) + 1)
        slots = upload(np.array([row.slot for row in rows]), memory.device)
        keys = memory.tables[Table.KEYS][:, :blocks].index_select(0, slots)
        offsets = memory.tables[Table.ARENA][:, :blocks].index_select(0, slots)
        is_absent = (keys == NOT_RESIDENT) & (offsets != NO_ARENA)
        at = torch.div(offsets, memory.geometry.slot_bytes, rounding_mode="floor")
        return torch.where(is_absent, at, NOT_RESIDENT).int()

    def start(
        self, rows: Seq[AuditRow], absent: Tensor, taps: Seq[LayerTap], *, missed: Tensor
    ) -> AuditCopies:
        """Score the absent blocks of every row and layer, and start bringing the verdicts to the host.

        Scored layer by layer, ranked and merged all at once: a step costs few launches, however many rows.
        `missed` bool [num_slots] then says of the rows that mark it whether evidence was absent.
        """
        pairs = [(row, tap.layer) for tap in taps for row in tap.members]
        chosen = upload(np.array([row for row, _ in pairs]), self._memory.device)
        visible = upload(np.array([(row.position + 1) // C4_RATIO for row in rows]), self._memory.device)
        absent, visible = absent[chosen], visible[chosen]
        scores, first = [], 0
        for tap in taps:
            part = slice(first, first + len(tap.members))
            scores.append(self._scores(tap, absent[part], visible[part]))
            first += len(tap.members)
        verdicts = self._verdicts(
            torch.cat(scores),
            absent,
            visible,
            (torch.cat([tap.selected for tap in taps]), torch.cat([tap.scores for tap in taps])),
        )
        if any(row.marks_miss for row in rows):
            self._mark(missed, rows, chosen, verdicts)
        place = {pair: line for line, pair in enumerate(pairs)}
        return AuditCopies(tuple(rows), place, HostCopy.of(verdicts.packed()))

    def _mark(self, missed: Tensor, rows: Seq[AuditRow], chosen: Tensor, verdicts: Verdicts) -> None:
        """`chosen` i64 [n]: which row each verdict is of. By the very counts that the host will read."""
        is_miss = (verdicts.counts[:, 1] < verdicts.counts[:, 0]).long()
        misses = torch.zeros(len(rows), dtype=torch.int64, device=missed.device)
        misses.index_add_(0, chosen, is_miss)
        marked = np.array([at for at, row in enumerate(rows) if row.marks_miss])
        slots = np.array([rows[at].slot for at in marked])
        missed[upload(slots, missed.device)] = misses[upload(marked, missed.device)] > 0

    def _scores(self, tap: LayerTap, absent: Tensor, visible: Tensor) -> Tensor:
        geometry = self._memory.geometry
        offset = geometry.keys_offset + tap.layer * geometry.keys_plane_bytes
        pool = KeyPool(self._slots, offset, key_layout(geometry))
        return native_indexer(tap.query, tap.weights, pool, block_table=absent, visible=visible)

    def _verdicts(
        self, scores: Tensor, absent: Tensor, visible: Tensor, resident: tuple[Tensor, Tensor]
    ) -> Verdicts:
        by_block = scores.view(len(absent), -1, BLOCK_ENTRIES)
        entry = torch.arange(scores.shape[1], device=scores.device)
        is_scored = (entry < visible[:, None]).view_as(by_block) & (absent >= 0)[..., None]
        unread = (is_scored & ~by_block.isfinite()).any(dim=2)  # [n, M]
        by_block.masked_fill_(unread[..., None], -torch.inf)
        best = select_topk(scores, self._topk)  # ascending: of equal scores the lower entries
        best_scores = scores.gather(1, best.clamp(min=0)).masked_fill(best < 0, -torch.inf)
        return merge_verdicts(resident, (best, best_scores), topk=self._topk, num_unread=unread.sum(1))


def merge_verdicts(
    resident: tuple[Tensor, Tensor], absent: tuple[Tensor, Tensor], *, topk: int, num_unread: Tensor
) -> Verdicts:
    """`kv.evidence.merge_audit` for n rows at once; each side is entries i64 [n, k] and scores f32 [n, k].

    Padding has a score of -inf. Equal scores (0.0 and -0.0 are equal) go to the lower entry.
    """
    entries = torch.cat((resident[0], absent[0]), dim=1)
    scores = torch.cat((resident[1], absent[1]), dim=1).double() + 0.0  # -0.0 + 0.0 is 0.0
    is_absent = torch.zeros_like(entries, dtype=torch.bool)
    is_absent[:, resident[0].shape[1] :] = True
    order = entries.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :topk]
    entries, scores, is_absent = (values.gather(1, order) for values in (entries, scores, is_absent))
    is_ranked = scores > -torch.inf
    probability = torch.softmax(scores, dim=1).masked_fill(~is_ranked, 0.0)
    is_evidence = probability >= EVIDENCE_PROBABILITY
    num_ranked = is_ranked.sum(1)
    num_resident = (is_ranked & ~is_absent).sum(1)
    missed = probability.masked_fill(~is_absent, 0.0)
    masses, at = missed.masked_fill(~is_evidence, 0.0).topk(min(MOST_EVIDENCE, missed.shape[1]), dim=1)
    recall = torch.where(num_ranked > 0, num_resident.double() / num_ranked.clamp(min=1), 1.0)
    return Verdicts(
        counts=torch.stack((is_evidence.sum(1), (is_evidence & ~is_absent).sum(1), num_unread), dim=1),
        shares=torch.stack((missed.sum(1).clamp(max=1.0), recall), dim=1),
        missing=entries.gather(1, at).masked_fill(masses == 0.0, -1),
        masses=masses,
    )


def _verdict(line: Tensor) -> tuple[AuditVerdict, int]:
    """One pair's, packed f64, and how many of its blocks were unread."""
    evidence, resident, unread, missed_mass, recall = line[:NUM_HEAD].tolist()
    mass_by_block: dict[BlockIdx, float] = {}
    if resident < evidence:
        missing, masses = line[NUM_HEAD:].view(2, -1).tolist()
        for entry, mass in zip(missing, masses, strict=True):
            if entry >= 0:
                block = BlockIdx(int(entry) // BLOCK_ENTRIES)
                mass_by_block[block] = mass_by_block.get(block, 0.0) + mass
    return AuditVerdict(
        num_evidence=int(evidence),
        num_evidence_resident=int(resident),
        missed_mass=missed_mass,
        recall_at_k=recall,
        missing=tuple(sorted(mass_by_block.items(), key=lambda item: (-item[1], item[0]))),
    ), int(unread)
