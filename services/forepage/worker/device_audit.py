"""Audits on the worker's own device, launched right behind the step they are about.

What the step asked with and what it selected is there already, and a kernel reads the absent blocks' keys
straight from the arena. So nothing travels to another process, and the verdict is known when the step's token
is: an answer of forty tokens can be repaired while it is written. The index makes the audits of workers that
have no such device.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

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


@dataclass(frozen=True)
class AuditRow:
    """One sequence's step to be looked at, in some c4 layers."""

    slot: int
    position: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class StepAudit:
    """What one step missed, layer by layer; `num_unread` absent blocks had damaged keys."""

    position: int
    verdicts: tuple[AuditVerdict, ...]
    num_unread: int


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of n rows on one layer, as tensors."""

    counts: Tensor  # i64 [n, 3]: evidence, of it resident, blocks unread
    shares: Tensor  # f64 [n, 2]: missed mass, recall at k
    missing: Tensor  # i64 [n, MOST_EVIDENCE]: absent entries with evidence, -1 behind them
    masses: Tensor  # f64 [n, MOST_EVIDENCE]


@dataclass(frozen=True)
class AuditCopies:
    """Verdicts on their way to the host."""

    rows: tuple[AuditRow, ...]
    place: dict[tuple[int, int], tuple[int, int]]
    """(row, layer) -> which of `layers`, and where in it."""
    layers: tuple[tuple[HostCopy, HostCopy, HostCopy, HostCopy], ...]

    def read(self, row: int) -> StepAudit:
        """One row's; waits for the copies."""
        asked = self.rows[row]
        verdicts, num_unread = [], 0
        for layer in asked.layers:
            part, at = self.place[row, layer]
            counts, shares, missing, masses = (copy.read()[at].tolist() for copy in self.layers[part])
            verdicts.append(_verdict(counts, shares, missing, masses))
            num_unread += counts[2]
        return StepAudit(asked.position, tuple(verdicts), num_unread)


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
        slots = upload(torch.tensor([row.slot for row in rows]).numpy(), memory.device)
        keys = memory.tables[Table.KEYS][:, :blocks].index_select(0, slots)
        offsets = memory.tables[Table.ARENA][:, :blocks].index_select(0, slots)
        is_absent = (keys == NOT_RESIDENT) & (offsets != NO_ARENA)
        at = torch.div(offsets, memory.geometry.slot_bytes, rounding_mode="floor")
        return torch.where(is_absent, at, NOT_RESIDENT).int()

    def start(self, rows: Seq[AuditRow], absent: Tensor, tap: "TapTensors") -> AuditCopies:
        """Score the absent blocks of every row and layer, and start bringing the verdicts to the host."""
        visible = torch.tensor([(row.position + 1) // C4_RATIO for row in rows])
        visible = upload(visible.numpy(), self._memory.device)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for at, row in enumerate(rows):
            for layer in row.layers:
                by_layer[layer].append(at)
        place: dict[tuple[int, int], tuple[int, int]] = {}
        copies = []
        for part, (layer, members) in enumerate(sorted(by_layer.items())):
            place |= {(row, layer): (part, at) for at, row in enumerate(members)}
            chosen = upload(torch.tensor(members).numpy(), self._memory.device)
            found = self._verdicts(layer, absent[chosen], visible[chosen], tap.rows(chosen).layer(layer))
            copies.append(
                (
                    HostCopy.of(found.counts),
                    HostCopy.of(found.shares),
                    HostCopy.of(found.missing),
                    HostCopy.of(found.masses),
                )
            )
        return AuditCopies(tuple(rows), place, tuple(copies))

    def _verdicts(self, layer: int, absent: Tensor, visible: Tensor, tap: "TapTensors") -> Verdicts:
        geometry = self._memory.geometry
        offset = geometry.keys_offset + layer * geometry.keys_plane_bytes
        pool = KeyPool(self._slots, offset, key_layout(geometry))
        scores = native_indexer(tap.query, tap.weights, pool, block_table=absent, visible=visible)
        by_block = scores.view(len(absent), -1, BLOCK_ENTRIES)
        entry = torch.arange(scores.shape[1], device=scores.device)
        is_scored = (entry < visible[:, None]).view_as(by_block) & (absent >= 0)[..., None]
        unread = (is_scored & ~by_block.isfinite()).any(dim=2)  # [n, M]
        by_block.masked_fill_(unread[..., None], -torch.inf)
        best = select_topk(scores, self._topk)  # ascending: of equal scores the lower entries
        best_scores = scores.gather(1, best.clamp(min=0)).masked_fill(best < 0, -torch.inf)
        return merge_verdicts(
            (tap.selected, tap.scores), (best, best_scores), topk=self._topk, num_unread=unread.sum(1)
        )


@dataclass(frozen=True)
class TapTensors:
    """What n rows left in some layers: [n, T, ...], or [n, ...] of one layer."""

    query: Tensor  # f32 [..., H, D]
    weights: Tensor  # f32 [..., H]
    selected: Tensor  # i64 [..., k]
    scores: Tensor  # f32 [..., k]

    def rows(self, chosen: Tensor) -> "TapTensors":
        """Of some rows, i64 [m]."""
        return TapTensors(
            self.query[chosen], self.weights[chosen], self.selected[chosen], self.scores[chosen]
        )

    def layer(self, layer: int) -> "TapTensors":
        """One layer's."""
        return TapTensors(
            self.query[:, layer].contiguous(),
            self.weights[:, layer].contiguous(),
            self.selected[:, layer],
            self.scores[:, layer],
        )


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


def _verdict(counts: list[int], shares: list[float], missing: list[int], masses: list[float]) -> AuditVerdict:
    mass_by_block: dict[BlockIdx, float] = {}
    for entry, mass in zip(missing, masses, strict=True):
        if entry >= 0:
            block = BlockIdx(entry // BLOCK_ENTRIES)
            mass_by_block[block] = mass_by_block.get(block, 0.0) + mass
    return AuditVerdict(
        num_evidence=counts[0],
        num_evidence_resident=counts[1],
        missed_mass=shares[0],
        recall_at_k=shares[1],
        missing=tuple(sorted(mass_by_block.items(), key=lambda item: (-item[1], item[0]))),
    )
