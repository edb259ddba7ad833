"""The arms of a comparison, as the `forepage` field of a request."""

from enum import StrEnum
from typing import Any

from forepage.kv.budget import budget_for
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO

BLOCK_TOKENS = BLOCK_ENTRIES * C4_RATIO


class Arm(StrEnum):
    """How the KV of a request is paged."""

    FULL = "full"
    LOOKAHEAD = "lookahead"
    GUARDED = "guarded"
    EXACT = "exact"
    RECENCY_ONLY = "recency-only"
    RANDOM = "random"


PLAN_SOURCE_OF = {Arm.RECENCY_ONLY: "recency", Arm.RANDOM: "random"}
"""Baselines: `lookahead` that keeps as many blocks as the memory indexer would, but others."""

PAGED = (Arm.LOOKAHEAD, Arm.GUARDED, Arm.RECENCY_ONLY, Arm.RANDOM)


def budget_of(length_tokens: int) -> int:
    """What a server gives a prompt of this length. Named: a request that names none may be kept full."""
    return budget_for(-(-length_tokens // BLOCK_TOKENS))


def residency_fields(arm: Arm, *, budget_blocks: int | None, threshold: float | None) -> dict[str, Any]:
    """The request's `forepage`; every arm is audited, though only `guarded` acts on it."""
    source = PLAN_SOURCE_OF.get(arm)
    fields = {
        "mode": "lookahead" if source else arm.value,
        "plan_source": source,
        "budget_blocks": budget_blocks,
        "threshold": threshold,
        "audit": True,
    }
    return {name: value for name, value in fields.items() if value is not None}
