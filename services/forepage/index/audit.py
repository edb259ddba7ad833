"""What the model would have selected: native scores of the absent blocks, merged with the resident ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.coldpool.records import SlotRef
from forepage.index.key_store import MappedKeys
from forepage.index.question import AuditQuestion
from forepage.kv.evidence import AuditVerdict, merge_audit
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.select_topk import select_topk

CHUNK_BLOCKS = 128
"""Absent blocks scored at once: 8,192 keys, 4 MB when decoded to fp32, which a CPU cache holds."""


@dataclass(frozen=True)
class AuditOutcome:
    """A verdict, and how many absent blocks it could not look at: above 0 it is partial."""

    verdict: AuditVerdict
    num_unread: int


def audit_layer(
    keys: MappedKeys, blocks: tuple[SlotRef, ...], question: AuditQuestion, check: Callable[[], None]
) -> AuditOutcome:
    """Score the absent blocks of one layer as the model does and say what of its true top-k was missing.

    `blocks` are the sequence's arena slots by block index; `check` may raise between chunks. Absent
    blocks whose slot changed hands or whose keys are damaged (a score that is not finite) are unread.
    """
    visible = (question.position + 1) // C4_RATIO
    # Ascending, so the visible entries of the chosen blocks put together are a prefix.
    asked = [block for block in question.absent_blocks if block * BLOCK_ENTRIES < visible]
    refs = [blocks[block] for block in asked]
    readable = keys.readable(refs)
    table = keys.block_table(refs, readable)  # i32 [n]
    num_visible = sum(min(BLOCK_ENTRIES, visible - block * BLOCK_ENTRIES) for block in asked)
    scores = _native_scores(keys, question, table, num_visible, check)  # [n, entries]
    readable &= keys.readable(refs)
    is_visible = (torch.arange(scores.numel()) < num_visible).view_as(scores)
    readable &= (scores.isfinite() | ~is_visible).all(dim=1)
    scores[~readable] = -torch.inf
    flat = scores.flatten()
    best = torch.zeros(0, dtype=torch.int64)
    if asked:
        best = select_topk(flat.unsqueeze(0), min(question.topk, flat.numel()))[0]
    best = best[best >= 0]
    # A lower index here is a lower entry too, so ties were cut as the model cuts them.
    first_entry = torch.tensor(asked, dtype=torch.int64) * BLOCK_ENTRIES
    entries = first_entry[best // BLOCK_ENTRIES] + best % BLOCK_ENTRIES
    return AuditOutcome(
        verdict=merge_audit(
            question.resident,
            zip(entries.tolist(), flat[best].tolist(), strict=True),
            topk=question.topk,
        ),
        num_unread=len(asked) - int(readable.sum()),
    )


def _native_scores(
    keys: MappedKeys, question: AuditQuestion, table: Tensor, num_visible: int, check: Callable[[], None]
) -> Tensor:
    """Scores of every entry of the table's blocks, -inf where absent or not visible: f32 [n, entries]."""
    scores = torch.empty(table.shape[0], BLOCK_ENTRIES)
    for start in range(0, table.shape[0], CHUNK_BLOCKS):
        check()
        part = table[start : start + CHUNK_BLOCKS]
        scores[start : start + CHUNK_BLOCKS] = native_indexer(
            question.query.unsqueeze(0),
            question.weights.unsqueeze(0),
            keys.pool(question.layer_idx),
            block_table=part.unsqueeze(0),
            visible=torch.tensor([max(0, num_visible - start * BLOCK_ENTRIES)]),
        ).view(-1, BLOCK_ENTRIES)
    return scores
