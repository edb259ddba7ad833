"""Which part of each tensor a tensor-parallel rank holds; no torch.

Attention heads go with their output groups, routed experts whole to one rank each. All else, and with it
KV cache and index, is the same on every rank: there is one key-value head.
"""

from forepage.errors import ModelFormatError
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Span
from forepage.model.weight_table import Split, WeightEntry, weight_table


def can_split(spec: ModelSpec, num_ranks: int) -> bool:
    """Whether heads, output groups and experts divide evenly."""
    return all(count % num_ranks == 0 for count in _shared_out(spec).values())


def check_split(spec: ModelSpec, num_ranks: int) -> None:
    """Raises: ModelFormatError naming what can't be divided by so many ranks."""
    uneven = [f"{name} {count}" for name, count in _shared_out(spec).items() if count % num_ranks]
    if uneven:
        raise ModelFormatError(
            f"the model can't be split over {num_ranks} ranks: {', '.join(uneven)} "
            f"{'does' if len(uneven) == 1 else 'do'} not divide"
        )


def rank_span(entry: WeightEntry, spec: ModelSpec, *, rank: int, num_ranks: int) -> Span | None:
    """The rank's part of a tensor; None: nothing of it. Asks `can_split` of the caller."""
    if entry.expert is not None:
        return Span.of(entry.shape) if entry.expert in rank_experts(spec, rank, num_ranks) else None
    if entry.split is Split.ROWS:
        return Span.of(entry.shape, rows=_share(entry.shape[0], rank, num_ranks))
    if entry.split is Split.COLUMNS:
        return Span.of(entry.shape, columns=_share(entry.shape[1], rank, num_ranks))
    return Span.of(entry.shape)


def rank_spans(spec: ModelSpec, *, rank: int, num_ranks: int) -> dict[str, Span]:
    """Every tensor the rank has something of, by name, and which part."""
    parts = {
        name: rank_span(entry, spec, rank=rank, num_ranks=num_ranks)
        for name, entry in weight_table(spec).items()
    }
    return {name: span for name, span in parts.items() if span is not None}


def rank_experts(spec: ModelSpec, rank: int, num_ranks: int) -> range:
    """The routed experts of a rank: consecutive ones."""
    share = _share(spec.num_experts, rank, num_ranks)
    return range(share.start, share.stop)


def _shared_out(spec: ModelSpec) -> dict[str, int]:
    """What ranks divide among them, by its name in config.json."""
    return {
        "num_attention_heads": spec.num_heads,
        "o_groups": spec.o_groups,
        "n_routed_experts": spec.num_experts,
    }


def _share(size: int, rank: int, num_ranks: int) -> slice:
    return slice(size // num_ranks * rank, size // num_ranks * (rank + 1))
