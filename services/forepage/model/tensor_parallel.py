"""Which part of each tensor a tensor-parallel rank holds; no torch.

Attention heads go with their output groups, routed experts whole to one rank each. All else, and with it
KV cache and index, is the same on every rank: there is one key-value head.
"""

from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Span
from forepage.model.weight_table import Split, WeightEntry


def can_split(spec: ModelSpec, num_ranks: int) -> bool:
    """Whether heads, output groups and experts divide evenly."""
    return all(count % num_ranks == 0 for count in (spec.num_heads, spec.o_groups, spec.num_experts))


def rank_span(entry: WeightEntry, spec: ModelSpec, *, rank: int, num_ranks: int) -> Span | None:
    """The rank's part of a tensor; None: nothing of it. Asks `can_split` of the caller."""
    if entry.expert is not None:
        mine = entry.expert * num_ranks // spec.num_experts == rank
        return Span.of(entry.shape) if mine else None
    if entry.split is Split.ROWS:
        return Span.of(entry.shape, rows=_share(entry.shape[0], rank, num_ranks))
    if entry.split is Split.COLUMNS:
        return Span.of(entry.shape, columns=_share(entry.shape[1], rank, num_ranks))
    return Span.of(entry.shape)


def _share(size: int, rank: int, num_ranks: int) -> slice:
    return slice(size // num_ranks * rank, size // num_ranks * (rank + 1))
